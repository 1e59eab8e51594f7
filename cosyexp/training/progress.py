"""The progress of a run, which is saved in every checkpoint."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: number of updates of the model.
        samples: number of utterances seen.
        updates: number of updates of each trainable.
        validated: step of the newest validation; -1 if there was none.
        losses: its losses.
        best: lowest finite validation loss so far.
        seconds: time spent in steps.
    """

    step: int = 0
    samples: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    validated: int = -1
    losses: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    seconds: float = 0.0
