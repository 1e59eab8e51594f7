"""Delivers the plan's micro-batches, made by worker processes ahead of time."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cosyexp.data.batch import Batch
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import VALIDATION, Draws
from cosyexp.data.sampler import BatchSampler


@dataclass(frozen=True)
class LoaderState:
    """Where training stands in the plan: `batch` micro-batches of `epoch` are consumed; `block` ordered that epoch."""

    epoch: int
    batch: int
    block: int


class MicroBatch(NamedTuple):
    """A batch and its number, in the step's block or in the validation's plan: the same on whatever rank it runs.

    idle: it repeats another one, and counts for nothing; an engine may want equally many on all ranks.
    """

    number: int
    batch: Batch
    idle: bool = False


class Request(NamedTuple):
    """What a worker is asked for: rows of micro-batches, by number; those from number `idle` on are idle."""

    epoch: int
    rows: Sequence[tuple[int, np.ndarray]]
    idle: int
    after: LoaderState | None = None


class Delivery(NamedTuple):
    micro_batches: list[MicroBatch]
    after: LoaderState | None


class BatchMaker(TorchDataset[Delivery]):
    """Makes what is requested; runs in the workers."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, request: Any) -> Delivery:
        draws = Draws(self.seed, request.epoch)
        made = [
            MicroBatch(i, self.dataset.batch(rows.tolist(), draws), i >= request.idle)
            for i, rows in request.rows
        ]
        return Delivery(made, request.after)


def dealt(
    batches: Sequence[np.ndarray], rank: int, world: int, equal_batches: bool
) -> list[tuple[int, np.ndarray]]:
    """Every world-th of the numbered micro-batches; where all ranks want equally many, the last one fills the last round."""
    numbers = range(-(-len(batches) // world) * world if equal_batches else len(batches))
    return [(number, batches[min(number, len(batches) - 1)]) for number in numbers[rank::world]]


def ignore_signals(_: int) -> None:
    """Workers leave the signals to the trainer, which stops them when its step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class Loader:
    """This rank's part of every training step, epoch after epoch; its state is one `LoaderState`.

    rank, world: this process and their number. accumulate: micro-batches a rank has in a step; the last step of an epoch may
    have fewer, even none. equal_batches: equally many on all ranks, by idle ones.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: BatchSampler,
        *,
        seed: int,
        rank: int,
        world: int,
        accumulate: int,
        workers: int,
        pin: bool,
        equal_batches: bool = False,
    ) -> None:
        self.dataset, self.sampler, self.seed, self.equal_batches = (
            dataset,
            sampler,
            seed,
            equal_batches,
        )
        self.rank, self.world, self.block = rank, world, world * accumulate
        self.options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": workers,
            "pin_memory": pin,
            "worker_init_fn": ignore_signals,
        }
        self.state = LoaderState(0, 0, self.block)
        self._steps: Iterator[Delivery] | None = None

    def seek(self, state: LoaderState) -> None:
        """Goes on at a place; an epoch that was begun with another block is finished in its request."""
        self.state, self._steps = state, None

    @property
    def epoch_ends(self) -> bool:
        """Whether the step consumed last was the last of its epoch."""
        return self.state.batch == 0 and self.state.epoch > 0

    def next_step(self) -> list[MicroBatch]:
        if self._steps is None:
            maker = BatchMaker(self.dataset, self.seed)
            self._steps = iter(
                DataLoader(maker, sampler=self._requests(self.state), **self.options)
            )
        micro_batches, after = next(self._steps)
        assert after is not None
        self.state = after
        return micro_batches

    def _requests(self, state: LoaderState) -> Iterator[Request]:
        while True:
            batches = self.sampler.epoch(state.epoch, state.block)
            following = LoaderState(state.epoch + 1, 0, self.block)
            for start in range(state.batch, len(batches), self.block):
                step = batches[start : start + self.block]
                end = start + len(step)
                after = following if end == len(batches) else replace(state, batch=end)
                yield Request(
                    state.epoch,
                    dealt(step, self.rank, self.world, self.equal_batches),
                    len(step),
                    after,
                )
            state = following

    def close(self) -> None:
        """Stops the workers; they would outlive the trainer, as they heed no signals."""
        self._steps = None


class ValidationLoader:
    """This rank's part of the validation's micro-batches; the same rows, order and draws each time.

    rounds: how many the rank with the most has. equal_batches: equally many on all ranks, by idle ones.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: BatchSampler,
        *,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        pin: bool,
        equal_batches: bool = False,
    ) -> None:
        self.maker, batches = BatchMaker(dataset, seed), list(sampler.in_order())
        self.requests = [
            Request(VALIDATION, [numbered], len(batches))
            for numbered in dealt(batches, rank, world, equal_batches)
        ]
        self.rounds = -(-len(batches) // world)
        self.options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": workers,
            "pin_memory": pin,
            "worker_init_fn": ignore_signals,
        }

    def __iter__(self) -> Iterator[MicroBatch]:
        for delivery in DataLoader(self.maker, sampler=self.requests, **self.options):
            yield from delivery.micro_batches
