"""Data parallelism: every rank holds the whole model, and gradients are summed over ranks."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cosyexp.objectives.base import Trainable
from cosyexp.registry import register
from cosyexp.training.engines.common import BaseEngine
from cosyexp.training.engines.reducer import Reducer


@register("engine")
class DDP(BaseEngine):
    """Sums gradients once a step, during the backward pass of the last micro-batch.

    A single process is plain training, without a process group.

    It does not use torch's `DistributedDataParallel`. With several micro-batches of several
    trainables in lockstep, that wrapper reduces wrong gradients without an error, because its
    reducer is armed by the last forward pass, while the first backward pass comes later.
    """

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        """Sets up the networks and optimizers, and a reducer for each trainable."""
        super().setup(trainables, frozen_modules)
        self.reducers = (
            {name: Reducer(self._parameters(name)) for name in trainables} if self.world > 1 else {}
        )

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        """Adds gradients; with the last micro-batch, starts to sum them over ranks."""
        if name in self.reducers:
            self.reducers[name].is_last = last
        self.scalers[name].scale(loss).backward()

    def _update(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self.reducers:
            self.reducers[name].finish()
        return super()._update(name)
