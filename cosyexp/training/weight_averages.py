"""What is kept of all the weights that a training passes through."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor


class WeightAverage(Protocol):
    """Follows the weights of a network on the device, update by update."""

    def update(self, updates: int, applied: Tensor) -> None:
        """Takes in the weights after `updates` updates; `applied` false (a tensor on the device) leaves it as it is."""
        ...

    def items(self) -> Iterator[tuple[str, Tensor]]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


def make_weight_averages(
    weights: Mapping[str, Tensor], *, ema: float | None, running_sum: bool
) -> dict[str, WeightAverage]:
    """Those that are asked for, by the name of their file in a checkpoint. ema: its decay.

    weights: as they are trained, or the part of them that this rank has.
    """
    means: dict[str, WeightAverage] = {}
    if ema:
        means["ema"] = EMA(weights, ema)
    if running_sum:
        means["sum"] = RunningSum(weights)
    return means


class EMA:
    """mean <- decay * mean + (1 - decay) * weights, in fp32 (Polyak & Juditsky 1992).

    Integers and booleans are copied. The first updates use a smaller decay, (1 + n) / (10 + n), so that the start is forgotten.
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
        share = (1 - min(self.decay, (1 + updates) / (10 + updates))) * applied.float()
        floats = [name for name, tensor in self._mean.items() if tensor.is_floating_point()]
        means = [self._mean[name] for name in floats]
        change = torch._foreach_sub([self._live[name].float() for name in floats], means)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(means, change)
        for name in self._mean.keys() - set(floats):
            self._mean[name].copy_(torch.where(applied, self._live[name], self._mean[name]))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """In fp32, whatever the weights are kept in."""
        yield from self._mean.items()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._mean.items():
            tensor.copy_(tensors[name])


class RunningSum:
    """sum <- sum + weights, in fp64: its difference between two checkpoints gives the mean of all weights in between.

    After n updates its rounding is below n * 1e-16 of it, so that the mean of 1000 weights after 1e5 has still 9 digits, where
    fp32 keeps 7. A sum in fp32 would have lost them all. How many weights it holds is the step: one for each applied update.
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
        for name, total in self._sum.items():  # one copy in fp64 at a time
            total.add_(self._live[name].double().mul_(applied))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """In fp64; integers and booleans have no sum."""
        yield from self._sum.items()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, total in self._sum.items():
            total.copy_(tensors[name])
