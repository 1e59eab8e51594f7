"""The progress of a run, which is saved in every checkpoint."""

import logging
from dataclasses import dataclass, field

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
