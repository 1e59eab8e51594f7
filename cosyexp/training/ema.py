"""A running mean of weights."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class EMA:
    """mean <- decay * mean + (1 - decay) * weights, in fp32 (Polyak & Juditsky 1992).

    Integers and booleans are copied. The first updates use a smaller decay, (1 + n) / (10 + n), so that the start is forgotten.

    weights: as they are trained, or the part of them that this rank has.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = dict(weights)
        self._mean = {
            name: tensor.detach().clone().float() if tensor.is_floating_point() else tensor.detach().clone()
            for name, tensor in self._live.items()
        }

    @torch.no_grad()
    def update(self, updates: int, applied: Tensor) -> None:
        """Takes in the weights after `updates` updates; `applied` false (a tensor on the device) leaves the mean as it is."""
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
