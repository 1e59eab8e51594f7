"""Every rank holds the whole model; gradients are summed over ranks. One process is plain training, with no process group."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cosyexp.objectives.base import Trainable
from cosyexp.training.engines.common import BaseEngine
from cosyexp.training.engines.reducer import Reducer


class DDP(BaseEngine):
    """Sums gradients once a step, while the backward of its last micro-batch goes on.

    torch's own wrapper is not used: with several micro-batches of several trainables in lockstep it silently reduces the wrong
    gradients, as its reducer is armed by the last forward while the first backward comes later.
    """

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        super().setup(trainables, frozen_modules)
        self.reducers = (
            {name: Reducer(self._trained(name)) for name in trainables} if self.world > 1 else {}
        )

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        if name in self.reducers:
            self.reducers[name].is_last = last
        self.scalers[name].scale(loss).backward()

    def _update(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self.reducers:
            self.reducers[name].finish()
        return super()._update(name)
