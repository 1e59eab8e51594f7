"""What a task is to the trainer: trainables, and a coroutine that yields one loss for each of them in turn.

To add a task, write a class like those beside this file and name it in `conf/objective/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Trainable:
    """A network that is trained, with how. Objectives reach the network by calling the trainable, never by other methods.

    optimizer: called with the parameters, makes the optimizer. scheduler: (update, base learning rate) -> learning rate.
    """

    module: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[int, float], float]

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)


class Term(NamedTuple):
    """One summand of a loss: a sum over units of a batch, to be divided by the number of units of the whole step.

    factor: its weight in the loss; 0 for what is only watched.
    """

    sum: Tensor
    unit: str
    factor: float


class Loss(dict[str, Term]):
    """Named terms: `Loss(mel=(sum, "segments", 45.0), ...)`."""

    def __init__(self, **terms: tuple[Tensor, str, float]) -> None:
        super().__init__({name: Term(*term) for name, term in terms.items()})

    def detach(self) -> "Loss":
        return Loss(
            **{name: term._replace(sum=term.sum.detach().double()) for name, term in self.items()}
        )

    def scaled(self, totals: Mapping[str, float]) -> Tensor:
        """The scalar to differentiate: this batch's share of the step's loss, given the step's units."""
        return torch.stack(
            [t.factor * t.sum / totals[t.unit] for t in self.values() if t.factor]
        ).sum()


class SpectrogramImage(NamedTuple):
    """A mel spectrogram to look at, (bands, frames)."""

    mel: np.ndarray


class Audio(NamedTuple):
    """A wave to listen to, (samples,) in [-1, 1], at a rate in Hz."""

    wave: np.ndarray
    sample_rate: int


class Objective(Protocol):
    """All that a task writes.

    trainables: in the order of their turns; the last one gives the model that is exported, and the step's loss.
    frozen_modules: networks and transforms that are used but not trained.
    units: the names of all units that `weights` counts.
    """

    trainables: Mapping[str, Trainable]
    frozen_modules: Sequence[nn.Module]
    units: tuple[str, ...]

    def count_units(self, batch: Any) -> dict[str, int]:
        """How many units of each kind a batch has, known before the forward."""
        ...

    def losses(self, batch: Any) -> Iterator[Loss]:
        """Yields one loss for each trainable; is resumed after that trainable's update. No context manager stays open at a yield."""
        ...

    def validate(self, batch: Any) -> Loss:
        """The loss of a validation batch; lower is better between any two checkpoints."""
        ...

    def preview(self, batch: Any) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        """Things to look at and to listen to for the first rows of a validation batch, by name."""
        ...


@runtime_checkable
class ReferenceObjective(Protocol):
    """An objective that compares its model with a frozen one, the reference.

    cache_reference: what the reference says is computed once and comes with the batches; else the network is the first module.
    """

    frozen_modules: Sequence[nn.Module]
    needs_reference: bool
    cache_reference: bool

    def frozen_copy(self) -> nn.Module:
        """A network like the model's, to hold the weights of the reference."""
        ...

    def reference(self, batch: Any, network: nn.Module) -> Tensor:
        """What a network says of each row of a batch, (B,)."""
        ...


@contextmanager
def frozen(trainable: Trainable) -> Iterator[None]:
    """Within it, gradients flow through the trainable's network but not into its weights."""
    trained = [parameter for parameter in trainable.module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
