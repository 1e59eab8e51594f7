"""Averages of the weights of all updates, which the engine maintains during training."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor


class WeightAverage(Protocol):
    """An average of the weights of a network, updated on the device after each of its updates."""

    def update(self, updates: int, applied: Tensor) -> None:
        """Adds the current weights to the average.

        Args:
            updates: number of updates done, including this one.
            applied: a boolean on the device; if it is False, the average stays as it is.
        """
        ...

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and tensors to save."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores tensors that `items` yielded."""
        ...


def make_weight_averages(
    weights: Mapping[str, Tensor], *, ema: float | None, running_sum: bool
) -> dict[str, WeightAverage]:
    """Makes the requested averages.

    Args:
        weights: the live weights, or this rank's shards of them.
        ema: decay of the exponential moving average; None for no such average.
        running_sum: whether to keep the running sum.

    Returns:
        The averages by the name of their file in a checkpoint: "ema", "sum".
    """
    averages: dict[str, WeightAverage] = {}
    if ema:
        averages["ema"] = EMA(weights, ema)
    if running_sum:
        averages["sum"] = RunningSum(weights)
    return averages


class EMA:
    """The exponential moving average of the weights, in fp32 (Polyak & Juditsky 1992).

    mean <- decay * mean + (1 - decay) * weights. The first updates use a smaller decay,
    (1 + n) / (10 + n) at update n, so that the initial weights are forgotten. Integer and boolean
    buffers are copied.

    Args:
        weights: the live weights.
        decay: the decay, below 1.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = dict(weights)
        self._mean = {
            name: tensor.detach().clone().float()
            if tensor.is_floating_point()
            else tensor.detach().clone()
            for name, tensor in self._live.items()
        }

    @torch.no_grad()
    def update(self, updates: int, applied: Tensor) -> None:
        """Moves the average towards the current weights, if the update was applied."""
        share = (1 - min(self.decay, (1 + updates) / (10 + updates))) * applied.float()
        floats = [name for name, tensor in self._mean.items() if tensor.is_floating_point()]
        means = [self._mean[name] for name in floats]
        change = torch._foreach_sub([self._live[name].float() for name in floats], means)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(means, change)
        for name in self._mean.keys() - set(floats):
            self._mean[name].copy_(torch.where(applied, self._live[name], self._mean[name]))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the average; floating-point tensors are in fp32, whatever the weights are in."""
        yield from self._mean.items()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a saved average."""
        for name, tensor in self._mean.items():
            tensor.copy_(tensors[name])


class RunningSum:
    """The sum of the weights after each applied update, in fp64.

    The difference of the sums of two checkpoints, divided by the difference of their steps, is the
    mean of the weights in between. After n updates the relative rounding error is below n * 1e-16,
    so the mean of 1000 updates after 1e5 still has 9 digits, while the weights in fp32 have 7. A
    sum in fp32 would have none left.

    Args:
        weights: the live weights; integer and boolean buffers are left out.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._live = {
            name: tensor for name, tensor in weights.items() if tensor.is_floating_point()
        }
        self._sum = {
            name: torch.zeros_like(tensor, dtype=torch.float64)
            for name, tensor in self._live.items()
        }

    @torch.no_grad()
    def update(self, updates: int, applied: Tensor) -> None:
        """Adds the current weights, if the update was applied."""
        for name, total in self._sum.items():  # holds only one fp64 copy at a time
            total.add_(self._live[name].double().mul_(applied))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the sums, in fp64."""
        yield from self._sum.items()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores saved sums."""
        for name, total in self._sum.items():
            total.copy_(tensors[name])
