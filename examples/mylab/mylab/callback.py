"""A callback with a state that survives a resume: a budget of tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosyexp.training.callbacks.base import Callback, StepStats

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer


class TokenBudget(Callback):
    """Ends the training after a number of tokens, counted over resumes too.

    Args:
        tokens: the budget.
    """

    def __init__(self, *, tokens: float) -> None:
        self.tokens, self.seen = tokens, 0.0

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        """Whether the budget is spent."""
        return self.seen >= self.tokens

    def on_step_end(self, trainer: "Trainer", stats: StepStats) -> None:
        """Counts the tokens of a step, over all ranks."""
        self.seen += stats.units["tokens"]
        trainer.log({"mylab/tokens": self.seen})

    def state_dict(self) -> dict[str, Any]:
        """Returns the count."""
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the count."""
        self.seen = state["seen"]
