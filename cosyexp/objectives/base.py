"""The interface between the trainer and an objective: what is trained, and with which loss.

An objective has one or more *trainables* (a network, its optimizer and its schedule). For a
micro-batch, `losses(batch)` is a generator that yields one loss for each trainable, in order. In
each step the trainer does, for each trainable:

    for each micro-batch:   loss = next(generator);  backward(loss)
    update the trainable

So the code that follows a `yield` runs after that trainable's update. A language model yields once;
a GAN yields the loss of its discriminator, then that of its generator.

To add an objective, write a class such as those in this folder and a YAML in `conf/objective/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from cosyexp.run.adapters import Adapter


class ParameterRule(NamedTuple):
    """How a parameter is trained, beside the options of its optimizer.

    Args:
        lr_scale: factor of its learning rate.
        decays: whether it has weight decay.
    """

    lr_scale: float = 1.0
    decays: bool = True


@dataclass
class Trainable:
    """A network that is trained, with its optimizer and its learning-rate schedule.

    Objectives run the network by calling the trainable. They call no other method of the network,
    as the hooks by which engines gather sharded weights are attached to `forward`.

    Args:
        module: the network.
        optimizer: makes the optimizer of the parameters that it is given.
        scheduler: (number of updates done, base learning rate) -> learning rate, such as those in
            `cosyexp.training.schedules`.
        rules: of the parameters that are not trained as all others, by name.
        adapter: the adapter in the network, which alone is saved; None if there is none.
    """

    module: nn.Module
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]
    scheduler: Callable[[int, float], float]
    rules: Mapping[str, ParameterRule] = field(default_factory=dict)
    adapter: Adapter | None = None

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def parameters(self) -> list[Any]:
        """Returns the trained parameters, in groups if there are rules, for an optimizer."""
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        if not self.rules:
            return [parameter for _, parameter in trained]
        groups: dict[ParameterRule, list[nn.Parameter]] = {}
        for name, parameter in trained:
            groups.setdefault(self.rules.get(name, ParameterRule()), []).append(parameter)
        return [
            {"params": members, "lr_scale": rule.lr_scale}
            | ({} if rule.decays else {"weight_decay": 0.0})
            for rule, members in groups.items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds of the network: the adapter, or else all of it."""
        state: dict[str, Tensor] = self.module.state_dict()
        if self.adapter is None:
            return state
        return {name: tensor for name, tensor in state.items() if ".lora_" in name}


class Term(NamedTuple):
    """One summand of a loss: a sum over the units of a micro-batch, such as its tokens.

    The trainer divides it by the number of units in the whole step, over all micro-batches and
    ranks. So the loss of a step is that of one large batch, however the step is split.

    Args:
        sum: a scalar, the sum over units.
        unit: name of the units; one of `Objective.units`.
        factor: weight of the term in the loss; 0 for a metric that is only logged.
    """

    sum: Tensor
    unit: str
    factor: float


class Loss(dict[str, Term]):
    """The terms of a loss by name: `Loss(mel=(sum, "segments", 45.0), ...)`."""

    def __init__(self, **terms: tuple[Tensor, str, float]) -> None:
        super().__init__({name: Term(*term) for name, term in terms.items()})

    def detach(self) -> "Loss":
        """Returns the loss without its graph, with sums in fp64."""
        return Loss(
            **{name: term._replace(sum=term.sum.detach().double()) for name, term in self.items()}
        )

    def scaled(self, totals: Mapping[str, float]) -> Tensor:
        """Returns the scalar to differentiate: this micro-batch's share of the loss of the step.

        Args:
            totals: number of units in the whole step, over all micro-batches and ranks.
        """
        return torch.stack(
            [t.factor * t.sum / totals[t.unit] for t in self.values() if t.factor]
        ).sum()


class SpectrogramImage(NamedTuple):
    """A mel spectrogram (bands, frames) that the loggers show as an image."""

    mel: np.ndarray


class Audio(NamedTuple):
    """A waveform (samples,) in [-1, 1] that the loggers save as audio; `sample_rate` is in Hz."""

    wave: np.ndarray
    sample_rate: int


class Objective(Protocol):
    """What the trainer needs of an objective.

    Args:
        trainables: the trainables by name, in the order of their losses. The last one is the model
            that is exported; its updates count as steps, and its loss is reported as the loss.
        frozen_modules: networks and transforms that are used but not trained; the engine moves them
            to its device.
        units: names of all units that `count_units` counts.
    """

    trainables: Mapping[str, Trainable]
    frozen_modules: Sequence[nn.Module]
    units: tuple[str, ...]

    def count_units(self, batch: Any) -> dict[str, int]:
        """Returns the number of units in a batch, for each kind; called before the forward pass."""
        ...

    def losses(self, batch: Any) -> Iterator[Loss]:
        """Yields one loss for each trainable, and is resumed after the update of that trainable.

        The generators of several micro-batches run in lockstep, so no context manager may be open
        at a `yield`: it would be closed in the wrong order.
        """
        ...

    def validate(self, batch: Any) -> Loss:
        """Returns the loss of a validation batch; a lower loss must mean a better checkpoint."""
        ...

    def preview(self, batch: Any) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        """Yields named images and audio of a small validation batch, for the loggers."""
        ...


class Metric(Protocol):
    """Protocol of validation metrics, see `cosyexp/objectives/metrics.py`."""

    def __call__(self, objective: Objective, batch: Any) -> Loss:
        """Returns terms of factor 0, under other names than those of the losses."""
        ...


@runtime_checkable
class ReferenceObjective(Objective, Protocol):
    """An objective that compares its model with a frozen reference model, such as DPO.

    Args:
        frozen_modules: its first module is the reference network, unless `cache_reference` is set.
        needs_reference: whether the selected loss uses a reference at all.
        cache_reference: whether the outputs of the reference are computed once, before the
            training, and come with the batches.
        reference_settings: names of the settings that the outputs of the reference depend on.
    """

    frozen_modules: Sequence[nn.Module]
    needs_reference: bool
    cache_reference: bool
    reference_settings: tuple[str, ...]

    def frozen_copy(self) -> nn.Module:
        """Returns a frozen copy of the model's network, for the weights of the reference."""
        ...

    def reference(self, batch: Any, network: nn.Module) -> Tensor:
        """Returns what is cached of the reference: the output of a network for each row, (B,)."""
        ...


@contextmanager
def frozen(trainable: Trainable) -> Iterator[None]:
    """Within the block, gradients flow through a trainable's network but not into its weights."""
    trained = [parameter for parameter in trainable.module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
