"""Traces a few steps with torch.profiler."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from cosyexp.registry import register
from cosyexp.run.files import replacement, write_text
from cosyexp.training.callbacks.base import Callback, StepStats

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer

log = logging.getLogger(__name__)


@register("callback")
class Profiler(Callback):
    """Writes a trace of rank 0 to `<run_dir>/profile/step_N.json`, and the costliest operators.

    Open the trace in chrome://tracing or ui.perfetto.dev; `step_N.txt` is a table.

    Args:
        wait: steps of this process before the trace, for caches to warm up.
        active: steps in the trace.
        memory: record memory too.

    Raises:
        ValueError: wait or active is out of range.
    """

    def __init__(self, *, wait: int = 5, active: int = 5, memory: bool = False) -> None:
        if wait < 0 or active < 1:
            raise ValueError(f"wait={wait} must be >= 0 and active={active} >= 1")
        self.wait, self.active, self.memory = wait, active, memory
        self.seen = 0
        self.profile: Any = None

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Starts the trace if there is nothing to wait for."""
        self.seen, self.profile = 0, None
        self._start_if_due(trainer)

    def on_step_end(self, trainer: "Trainer", stats: StepStats) -> None:
        """Starts the trace, or writes it."""
        self.seen += 1
        if self.profile is not None and self.seen == self.wait + self.active:
            self._write(trainer)
        self._start_if_due(trainer)

    def on_fit_end(self, trainer: "Trainer") -> None:
        """Writes a trace that is not complete."""
        if self.profile is not None:
            self._write(trainer)

    def _start_if_due(self, trainer: "Trainer") -> None:
        if self.seen != self.wait or trainer.engine.rank > 0:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if trainer.engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, profile_memory=self.memory)
        self.profile.start()

    def _write(self, trainer: "Trainer") -> None:
        profile, self.profile = self.profile, None
        profile.stop()
        path = trainer.run.file("profile", f"step_{trainer.progress.step}.json")
        with replacement(path) as part:
            profile.export_chrome_trace(str(part))
        key = (
            "self_cuda_time_total"
            if trainer.engine.device.type == "cuda"
            else "self_cpu_time_total"
        )
        table = profile.key_averages().table(sort_by=key, row_limit=30)
        write_text(trainer.run.file("profile", f"{path.stem}.txt"), table)
        log.info("profiler: %s", path)
