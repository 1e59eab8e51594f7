"""What the trainer asks of an engine. An engine decides where and how a run computes, never what it learns.

To add one, write a class like `ddp.DDP` and a YAML in `conf/engine/`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cosyexp.objectives.base import Trainable


@dataclass(frozen=True)
class StepReport:
    """What an update did. Both are tensors on the device, so that reading them waits for nothing.

    grad_norm: before clipping. applied: whether it was finite, and so the weights moved.
    """

    grad_norm: Tensor
    applied: Tensor


class Engine(Protocol):
    """rank, world: this process and the number of processes. device: where batches go.

    equal_batches: every rank must run equally many forwards, as in them it waits for the others.
    layout: how the optimizer state lies in a checkpoint; "whole", or something that another engine cannot resume from.
    """

    rank: int
    world: int
    device: torch.device
    equal_batches: bool
    optimizer_layout: str

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        """Moves networks to the device, makes the optimizers."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward."""
        ...

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        """Adds the gradients of a trainable's share of the step's loss. last: of this rank's micro-batches in the step."""
        ...

    def step(self, name: str, update: int) -> StepReport:
        """Sums the gradients over ranks, clips, updates the trainable unless they are not finite, and clears them.

        update: how many updates this trainable had, from which its learning rate follows. A rank without micro-batches calls it too,
        unless the engine has equal_batches.
        """
        ...

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, on the host."""
        ...

    def all_gather(self, content: Any) -> list[Any]:
        """What every rank gave, by rank."""
        ...

    def learning_rate(self, name: str) -> float: ...

    def weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A trainable's full weights, tensor by tensor, to rank 0; all ranks iterate."""
        ...

    def weight_averages(self) -> Mapping[str, Iterator[tuple[str, Tensor]]]:
        """What is kept of the last trainable's weights besides themselves (`training/ema.py`), by name; like `weights`."""
        ...

    def save_state(self, folder: Path) -> dict[str, Any]:
        """What this rank must save besides the weights; empty where another rank saves it all. All ranks call it.

        Optimizer state that lies in parts is not returned: it is written into the folder.
        """
        ...

    def load(
        self,
        weights: Mapping[str, Mapping[str, Tensor]],
        means: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Restores weights by trainable, `means` by name, and what `save_state` of this rank (or of rank 0) gave and wrote."""
        ...

    def close(self) -> None: ...
