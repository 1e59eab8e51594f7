"""The base class of callbacks.

To add a callback, write a subclass, and a YAML in `conf/callbacks/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyexp.errors import UserError
from cosyexp.training.validation import measured_names

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer


@dataclass(frozen=True)
class StepStats:
    """Statistics of one step.

    Attributes:
        units: counts of the objective's units (tokens, frames, segments, pairs) and of utterances,
            summed over ranks.
        data_seconds: time that this rank waited for its micro-batches.
    """

    units: Mapping[str, float]
    data_seconds: float


class Callback:
    """Base class of callbacks; override the events that you need.

    Events come in this order, on every rank:

        on_fit_start
        each step:    on_step_end
                      measure, on_validation_end    if a validation is due
                      on_save              after a checkpoint is written
        on_fit_end                         also if the run is stopped; not after an error

    The `state_dict` of rank 0 is a part of each checkpoint. A resumed run restores it before
    `on_fit_start`, so that a callback continues as if the run had not been interrupted. It may have
    tensors, numbers, strings, and containers of them.
    """

    # a validation loss or metric that must be measured; the state is not restored on other data
    monitors: str | None = None
    # names of the values that `measure` adds to a validation
    measures: Sequence[str] = ()
    should_stop = False  # True ends the training after this step, as if it were the last one

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Runs before the first step of this process."""

    def on_step_end(self, trainer: "Trainer", stats: StepStats) -> None:
        """Runs after each step; `trainer.progress.step` counts it."""

    def measure(self, trainer: "Trainer") -> Mapping[str, float]:
        """Returns more values of a validation, by name, which must be the same on all ranks.

        They are logged as `valid/<name>`, and are kept with the losses.
        """
        return {}

    def on_validation_end(self, trainer: "Trainer", losses: Mapping[str, float]) -> None:
        """Runs after each validation, with its losses and metrics by name."""

    def on_save(self, trainer: "Trainer", checkpoint: Path) -> None:
        """Runs after a checkpoint is written, before older ones are pruned."""

    def on_fit_end(self, trainer: "Trainer") -> None:
        """Runs after the last step of this process."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


def refuse_unmeasured(trainer: "Trainer") -> None:
    """Checks that the validation measures what the callbacks monitor; all ranks call it.

    Raises:
        UserError: it does not, or there is no validation.
    """
    monitored = {key: c.monitors for key, c in trainer.callbacks.items() if c.monitors}
    if not monitored:
        return
    if trainer.validation is None:
        raise UserError(
            f"callbacks.{next(iter(monitored))} monitors the validation, but data.valid=null: give "
            f"validation data, or leave out the callback"
        )
    measured = measured_names(
        trainer.objective, trainer.engine, trainer.validation, trainer.metrics.values()
    )
    measured += [name for c in trainer.callbacks.values() for name in c.measures]
    for key, name in monitored.items():
        if name not in measured:
            raise UserError(
                f"callbacks.{key} monitors {name}, which the validation does not measure: choose "
                f"one of {', '.join(measured)}"
            )
