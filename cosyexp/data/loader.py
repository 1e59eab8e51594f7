"""Data loaders: the micro-batches of each training step and of validation, for one rank."""

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from cosyexp.errors import UserError, reason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderState:
    """The position of training in the data; together with the seed it is all that a resume needs.

    Attributes:
        epoch: number of the epoch, from 0.
        batch: micro-batches of the epoch that all ranks have consumed.
        block: micro-batches of a step (world size x accumulation) when the epoch was started, which
            determines the order of the epoch.
    """

    epoch: int
    batch: int
    block: int


class MicroBatch(NamedTuple):
    """A batch and its number, which is the same on whatever rank it runs.

    Attributes:
        number: index in the step's block, or among the micro-batches of validation.
        batch: the padded tensors.
        idle: it repeats another micro-batch and its loss does not count, because the engine needs
            equally many micro-batches on all ranks.
    """

    number: int
    batch: Batch
    idle: bool = False


class Request(NamedTuple):
    """The micro-batches that a worker is asked to make.

    Attributes:
        epoch: the epoch that keys the random numbers.
        rows: number and row indices of each micro-batch.
        idle: micro-batches from this number on are idle.
        after: state of the loader once they are consumed; None in validation.
    """

    epoch: int
    rows: Sequence[tuple[int, np.ndarray]]
    idle: int
    after: LoaderState | None = None


class Delivery(NamedTuple):
    """The micro-batches that a worker made, and the state of the loader once they are consumed."""

    micro_batches: list[MicroBatch]
    after: LoaderState | None


class BatchMaker(TorchDataset[Delivery]):
    """The map-style dataset of torch's `DataLoader`: makes the micro-batches of a request.

    It runs in the worker processes.
    """

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
    """Returns the micro-batches of one rank: every `world`-th, with its number.

    Args:
        batches: row indices of the micro-batches of all ranks.
        rank: rank of this process.
        world: number of ranks.
        equal_batches: repeats the last micro-batch until all ranks have equally many.
    """
    numbers = range(-(-len(batches) // world) * world if equal_batches else len(batches))
    return [(number, batches[min(number, len(batches) - 1)]) for number in numbers[rank::world]]


@contextmanager
def with_worker_errors() -> Iterator[None]:
    """Turns the end of a data worker into one sentence.

    torch raises it wherever the training process is when the worker ends.

    Raises:
        UserError: a data worker was killed, or ended for another reason.
    """
    try:
        yield
    except RuntimeError as error:
        if not (what := reason(error)).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a data worker ended ({what.rstrip('. ')}), as when memory or /dev/shm runs out: "
            f"repeat the command to resume from the last checkpoint, perhaps with fewer "
            f"data.workers="
        ) from None


def ignore_signals(_: int) -> None:
    """Initializes a worker: it ignores SIGINT and SIGTERM and computes on one thread.

    The trainer handles these signals and stops its workers once its step is done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class Loader:
    """This rank's micro-batches of every training step, epoch after epoch.

    Args:
        dataset: the training data.
        sampler: groups its rows into micro-batches.
        seed: seed of the random numbers that travel with the batches.
        rank: rank of this process.
        world: number of ranks.
        accumulate: micro-batches of a rank in a step; the last step of an epoch may have fewer,
            even none.
        workers: processes that make batches ahead of time; 0: the trainer makes them itself.
        pin: copies the batches to pinned memory.
        equal_batches: gives all ranks equally many micro-batches, by idle ones.

    Attributes:
        state: position after the step that was consumed last.
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
        self.dataset, self.sampler, self.seed = dataset, sampler, seed
        self.equal_batches = equal_batches
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
        """Continues from a position.

        An epoch that was started with another block size is finished in the order of that size.
        """
        self.state, self._steps = state, None
        if state.batch and state.block != self.block:
            message = (
                "the current epoch goes on in steps of %d micro-batches, the next in steps of %d"
            )
            log.info(message, state.block, self.block)

    @property
    def epoch_ends(self) -> bool:
        """Whether the step that was consumed last was the last of its epoch."""
        return self.state.batch == 0 and self.state.epoch > 0

    def next_step(self) -> list[MicroBatch]:
        """Returns this rank's micro-batches of the next step and advances the state."""
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
        """Stops the workers, which would outlive the trainer as they ignore signals."""
        self._steps = None


class ValidationLoader:
    """This rank's micro-batches of validation: the same rows, order and random numbers each time.

    Args:
        dataset: the validation data.
        sampler: groups its rows into micro-batches.
        seed: seed of the random numbers that travel with the batches.
        rank: rank of this process.
        world: number of ranks.
        workers: processes that make batches ahead of time; 0: the trainer makes them itself.
        pin: copies the batches to pinned memory.
        equal_batches: gives all ranks equally many micro-batches, by idle ones.

    Attributes:
        rounds: micro-batches of the rank that has the most.
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
        self.dataset, self.maker = dataset, BatchMaker(dataset, seed)
        batches = list(sampler.in_order())
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

    def first(self) -> MicroBatch | None:
        """Returns this rank's first micro-batch, if it has any, without starting a worker."""
        return self.maker[self.requests[0]].micro_batches[0] if self.requests else None

    def __iter__(self) -> Iterator[MicroBatch]:
        for delivery in DataLoader(self.maker, sampler=self.requests, **self.options):
            yield from delivery.micro_batches
