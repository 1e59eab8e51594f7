"""Logs how fast a run is and how long it waits for data."""

import time
from collections import Counter
from typing import TYPE_CHECKING

from cosyexp.registry import register
from cosyexp.training.callbacks.base import Callback, StepStats

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer


@register("callback")
class Throughput(Callback):
    """Logs units per second of wall time, and the share of it spent waiting for data.

    The units are the objective's: tokens, frames, segments or pairs, and utterances, summed over
    ranks: `time/tokens_per_second`, `time/utterances_per_second`, `time/steps_per_second`,
    `time/data_share` (of rank 0).

    Args:
        every: steps between two logs.

    Raises:
        ValueError: every is negative.
    """

    def __init__(self, *, every: int = 50) -> None:
        if every < 0:
            raise ValueError(f"every={every} must be >= 0")
        self.every = every

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Starts the clock."""
        self._restart()

    def on_step_end(self, trainer: "Trainer", stats: StepStats) -> None:
        """Counts a step, and logs if it is time."""
        self._units.update(stats.units)
        self._steps += 1
        self._waited += stats.data_seconds
        if not self.every or trainer.progress.step % self.every:
            return
        seconds = time.perf_counter() - self._began
        values = {f"time/{unit}_per_second": n / seconds for unit, n in self._units.items()}
        values["time/steps_per_second"] = self._steps / seconds
        values["time/data_share"] = self._waited / seconds
        trainer.log(values)
        self._restart()

    def _restart(self) -> None:
        self._units: Counter[str] = Counter()
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()
