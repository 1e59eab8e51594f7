"""Keeps the best checkpoints by any validation loss or metric."""

from typing import TYPE_CHECKING

from cosyexp.registry import register
from cosyexp.run.checkpoint import Criterion, KeepBest
from cosyexp.training.callbacks.base import Callback

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer


@register("callback")
class BestCheckpoint(Callback):
    """Adds a rule to the pruning of checkpoints: the best `keep` by `monitor` stay.

    They are found later by `average select=best metric=<monitor> metric_mode=<mode>` and by
    `export weights=best metric=<monitor> metric_mode=<mode>`.

    Args:
        monitor: name of a validation loss or metric.
        mode: "min" or "max", which values are better.
        keep: number of checkpoints.

    Raises:
        ValueError: mode or keep is out of range.
    """

    def __init__(self, *, monitor: str, mode: str = "min", keep: int = 1) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode} must be min or max")
        if keep < 1:
            raise ValueError(f"keep={keep} must be >= 1")
        self.monitors = monitor
        self.rule = KeepBest(Criterion(monitor, mode), keep)

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Adds the rule."""
        trainer.keep_best.append(self.rule)
