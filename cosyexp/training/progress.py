"""How far a run is; part of every checkpoint."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run is.

    step: updates of the model. samples: utterances seen. updates: of each trainable. validated: the
    step of the newest validation, whose losses `losses` holds. best: the lowest finite validation
    loss so far. seconds: spent in steps.
    """

    step: int = 0
    samples: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    validated: int = -1
    losses: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    seconds: float = 0.0
