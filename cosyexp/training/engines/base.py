"""The interface between the trainer and an engine, which decides where and how a run is computed.

An engine owns the devices, the precision, the optimizers and the communication between ranks. It
does not change what is learned: the same steps under another engine or number of ranks give the
same weights, up to rounding. Every rank has an engine. The trainer calls it in this order:

    engine.setup(trainables, frozen_modules)
    engine.load(...)                                    # if the run is resumed
    for each step:
        for each trainable:
            for each micro-batch of this rank:
                with engine.autocast():
                    ...                                 # the objective computes the loss
                engine.backward(name, loss, last)
            engine.step(name, update)
    engine.weights(name), weight_averages(), save_state(folder)     # at each checkpoint
    engine.close()

To add an engine, subclass `common.BaseEngine`, which implements everything but `backward`, and
write a YAML in `conf/engine/`. `ddp.DDP` is the smallest example. An engine is constructed with the
keys of its YAML and with `precision`, `max_grad_norm`, `ema` and `running_sum` of the trainer's
config.
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
    """The result of an update, as tensors on the device, so that the host need not wait for it.

    Args:
        grad_norm: the norm of all gradients of the trainable, before clipping.
        applied: whether the norm was finite, so that the weights were updated.
    """

    grad_norm: Tensor
    applied: Tensor


class Engine(Protocol):
    """What the trainer needs of an engine.

    Args:
        rank: index of this process.
        world: number of processes.
        device: where batches go.
        equal_batches: whether every rank must run the same number of forward passes, because ranks
            communicate in them. The loader then adds idle micro-batches, whose loss counts 0 times.
        optimizer_layout: describes how the optimizer state is laid out in a checkpoint. An engine
            can only resume checkpoints of the same layout; "whole" is the one that most engines
            share.
        optimizers: of each trainable, after `setup`.
    """

    rank: int
    world: int
    device: torch.device
    equal_batches: bool
    optimizer_layout: str
    optimizers: dict[str, torch.optim.Optimizer]

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        """Moves all networks to the device and makes the optimizers.

        Args:
            trainables: the networks to train, by name. Weight averages are kept of the last one.
            frozen_modules: networks and transforms that are only used.
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context manager in which every forward pass runs."""
        ...

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        """Adds the gradients of a loss to those of a trainable.

        Args:
            name: the trainable.
            loss: a scalar, the share of one micro-batch in the loss of the step. It is already
                divided by the number of units in the step, so gradients are summed over
                micro-batches and ranks, not averaged.
            last: whether it is this rank's last micro-batch in the step.
        """
        ...

    def step(self, name: str, update: int) -> StepReport:
        """Updates a trainable from its gradients, and clears them.

        The gradients are summed over ranks and clipped. If their norm is not finite, neither the
        weights nor the optimizer state change. All ranks call this, even one without micro-batches,
        which exists only if `equal_batches` is False.

        Args:
            name: the trainable.
            update: number of updates that the trainable had, which determines its learning rate.
        """
        ...

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of each value over all ranks, in fp64 on the host."""
        ...

    def all_gather(self, content: Any) -> list[Any]:
        """Returns what each rank passed, in the order of the ranks; also serves as a barrier."""
        ...

    def learning_rate(self, name: str) -> float:
        """Returns the learning rate of a trainable's last update."""
        ...

    def weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and full weights of a trainable, one tensor at a time.

        All ranks iterate, as the tensors may have to be gathered; only rank 0 uses them.
        """
        ...

    def weight_averages(self) -> Mapping[str, Iterator[tuple[str, Tensor]]]:
        """Returns the averages of the last trainable's weights by name, each as `weights` does.

        See `cosyexp.training.weight_averages`.
        """
        ...

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Returns or writes the state of optimizers and loss scalers; all ranks call it.

        Args:
            folder: where to write optimizer state that is sharded over ranks.

        Returns:
            The rest of the state, or {} if rank 0 returns it for all ranks.
        """
        ...

    def load(
        self,
        weights: Mapping[str, Mapping[str, Tensor]],
        means: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Restores a checkpoint; all ranks call it.

        Args:
            weights: the full weights of each trainable.
            means: the full tensors of each weight average.
            state: what `save_state` returned on this rank or, if that was {}, on rank 0.
            folder: the folder that was given to `save_state`.
        """
        ...

    def close(self) -> None:
        """Releases what the engine holds, such as the process group."""
        ...
