"""The progress of a run, which is saved in every checkpoint."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: number of updates of the model.
        samples: number of utterances seen.
        updates: number of updates of each trainable.
        validated: step of the newest validation; -1 if there was none.
        losses: its losses.
        best: lowest finite validation loss so far, on the same validation data.
        validation: fingerprint of the validation data of `losses` and `best`.
        seconds: time spent in steps.
    """

    step: int = 0
    samples: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    validated: int = -1
    losses: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    validation: str | None = None
    seconds: float = 0.0

    def add_validation(self, losses: Mapping[str, float], data: str) -> None:
        """Records the losses of a validation at this step.

        Args:
            losses: by name.
            data: fingerprint of the validation data.
        """
        self.validated, self.losses, self.validation = self.step, dict(losses), data
        if math.isfinite(losses["loss"]):
            self.best = min(losses["loss"], math.inf if self.best is None else self.best)

    def validation_meta(self) -> dict[str, Any]:
        """Returns what the `meta.yaml` of a checkpoint says of a validation at this step."""
        if self.validated != self.step:
            return {"loss_dict": {}, "validation": None}
        return {"loss_dict": self.losses, "validation": self.validation}

    def use_validation(self, data: str) -> bool:
        """Forgets the validation losses if they were measured on other data.

        Args:
            data: fingerprint of the validation data from now on.

        Returns:
            Whether there were such losses.
        """
        if self.validation in (None, data):
            return False
        log.info(
            "the validation data changed from %s to %s: the best loss starts anew",
            self.validation,
            data,
        )
        self.validated, self.losses, self.best, self.validation = -1, {}, None, data
        return True
