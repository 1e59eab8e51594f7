"""Ends a run whose validation no longer improves."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosyexp.registry import register
from cosyexp.training.callbacks.base import Callback

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer

log = logging.getLogger(__name__)


@register("callback")
class EarlyStopping(Callback):
    """Stops after `patience` validations in a row without an improvement.

    A value that is not finite is no improvement.

    Args:
        monitor: name of a validation loss or metric.
        mode: "min" or "max", which values are better.
        patience: validations without an improvement that are tolerated.
        min_delta: smallest change that counts as an improvement.

    Raises:
        ValueError: mode or patience is out of range.
    """

    monitors: str

    def __init__(
        self, *, monitor: str = "loss", mode: str = "min", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode} must be min or max")
        if patience < 1:
            raise ValueError(f"patience={patience} must be >= 1")
        self.monitors, self.sign, self.patience = monitor, 1 if mode == "min" else -1, patience
        self.min_delta = min_delta
        self.best, self.waited = math.inf, 0  # of sign * value

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        """Whether there were `patience` validations without an improvement."""
        return self.waited >= self.patience

    def on_validation_end(self, trainer: "Trainer", losses: Mapping[str, float]) -> None:
        """Compares the monitored value with the best one so far, if it was measured."""
        if (value := losses.get(self.monitors)) is None:
            return
        if math.isfinite(value) and self.sign * value < self.best - self.min_delta:
            self.best, self.waited = self.sign * value, 0
            return
        self.waited += 1
        if self.should_stop:
            log.info(
                "early stopping: %s has not improved on %.4f for %d validations",
                self.monitors,
                self.sign * self.best,
                self.waited,
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, and the number of validations since."""
        return {
            "monitor": self.monitors,
            "sign": self.sign,
            "best": self.best,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, unless it is about another value."""
        if (state["monitor"], state["sign"]) == (self.monitors, self.sign):
            self.best, self.waited = state["best"], state["waited"]
