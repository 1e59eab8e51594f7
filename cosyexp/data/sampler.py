"""The batch sampler: which utterances form each micro-batch of an epoch, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from cosyexp.data.draws import keyed

# Width of the relative noise on lengths before sorting, so that epochs group rows differently.
JITTER = 0.05
WINDOW = 100_000  # rows that are sorted by length at a time


def cut(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Cuts consecutive rows into micro-batches whose padded size stays within a budget.

    Args:
        lengths: lengths of the rows, in order.
        budget: maximum of rows x longest row; a single row above it is a micro-batch by itself.

    Returns:
        The index of the first row of each micro-batch.
    """
    firsts, start, longest = [0], 0, 0
    for i, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > budget:
            firsts.append(i)
            start, longest = i, length
    return np.array(firsts)


class MicroBatches(Sequence[np.ndarray]):
    """A sequence of micro-batches, each an array of row indices, sliced out of `rows` on access.

    Args:
        rows: row indices of all micro-batches, one after another.
        firsts: where each micro-batch begins in `rows`.
        order: the order in which the micro-batches are used.
    """

    def __init__(self, rows: np.ndarray, firsts: np.ndarray, order: np.ndarray) -> None:
        self.rows, self.ends, self.order = rows, np.append(firsts, len(rows)), order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self.order[index]
        return self.rows[self.ends[number] : self.ends[number + 1]]


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Groups rows of similar length into micro-batches, as a pure function of seed and epoch.

    Nothing is drawn while training, so a position in the epoch is the whole state of the sampler.

    Attributes:
        lengths: length of each row, in the unit that the model pads (tokens or frames).
        budget: maximum of rows x longest row of a micro-batch.
        seed: seed of the order.
        repeats: how often each row occurs in an epoch, on average; None: once.
    """

    lengths: np.ndarray
    budget: int
    seed: int
    repeats: np.ndarray | None = None

    def epoch(self, number: int, block: int) -> MicroBatches:
        """Returns the micro-batches of an epoch, in the order in which training uses them.

        Rows of similar length share a micro-batch, and `block` micro-batches of similar length
        follow one another, so that all ranks and accumulated micro-batches of a step take about as
        long. The remainder that does not fill a block comes last.

        Args:
            number: number of the epoch, from 0.
            block: micro-batches of a step: world size x gradient accumulation.
        """
        draw = keyed(self.seed, number, "plan")
        rows = draw.permutation(self._rows(number))
        firsts = []
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            blurred = self.lengths[window] * (1 + JITTER * (draw.random(len(window)) - 0.5))
            rows[start : start + WINDOW] = window = window[np.argsort(blurred, kind="stable")]
            firsts.append(start + cut(self.lengths[window], self.budget))
        count = sum(map(len, firsts))
        full, rest = divmod(count, block)
        # The remainder is taken out at a random place, so that it is not always the longest rows.
        at = int(draw.integers(full + 1)) * block
        order = np.concatenate(
            [np.arange(at), np.arange(at + rest, count), np.arange(at, at + rest)]
        )
        blocks = order[: full * block].reshape(full, block)[draw.permutation(full)]
        return MicroBatches(
            rows, np.concatenate(firsts), np.concatenate([blocks.ravel(), order[full * block :]])
        )

    def in_order(self) -> MicroBatches:
        """Returns the micro-batches of validation: sorted by length, always the same."""
        rows = np.argsort(self.lengths, kind="stable")
        firsts = cut(self.lengths[rows], self.budget)
        return MicroBatches(rows, firsts, np.arange(len(firsts)))

    def padding(self) -> float:
        """Returns the share of padding, from 0 to 1, in an epoch of the first `WINDOW` rows."""
        lengths = self.lengths[:WINDOW]
        rows = BatchSampler(lengths=lengths, budget=self.budget, seed=self.seed).epoch(0, 1)
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in rows)
        return 1 - float(lengths.sum()) / max(padded, 1)

    def _rows(self, number: int) -> np.ndarray:
        """Returns the rows of an epoch, each repeated.

        A row that is repeated 1.5 times on average occurs once or twice, drawn again in each epoch.
        """
        rows = np.arange(len(self.lengths))
        if self.repeats is None:
            return rows
        chance = keyed(self.seed, number, "weights").random(len(rows))
        times = (self.repeats + chance).astype(int)
        return np.repeat(rows, times) if times.any() else rows[[int(chance.argmax())]]
