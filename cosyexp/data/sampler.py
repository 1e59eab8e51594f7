"""The plan of an epoch: which utterances go into which micro-batch, and in which order the steps take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from cosyexp.data.draws import keyed

JITTER = 0.05  # lengths are blurred by half this share, up or down, before sorting, so that epochs group the rows differently
WINDOW = 100_000  # rows sorted by length at a time


def cut(lengths: np.ndarray, budget: int) -> np.ndarray:
    """The first rows of runs whose padded size, rows x longest, stays within `budget`; a row above it stands alone."""
    firsts, start, longest = [0], 0, 0
    for i, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > budget:
            firsts.append(i)
            start, longest = i, length
    return np.array(firsts)


class MicroBatches(Sequence[np.ndarray]):
    """The row numbers of micro-batches, each an array, in the order in which they are taken; made when they are asked for.

    rows: of all, one after another. firsts: where each begins. order: of the micro-batches.
    """

    def __init__(self, rows: np.ndarray, firsts: np.ndarray, order: np.ndarray) -> None:
        self.rows, self.ends, self.order = rows, np.append(firsts, len(rows)), order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> list[np.ndarray]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = self.order[place]
        return self.rows[self.ends[number] : self.ends[number + 1]]


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """A pure function of (seed, epoch, lengths): nothing is drawn while training, so a position is the whole state.

    lengths: of each row, in the unit the model pads (tokens, frames).
    budget: rows x longest row of a micro-batch stays within it.
    repeats: how often each row occurs in an epoch, on average; None: once.
    """

    lengths: np.ndarray
    budget: int
    seed: int
    repeats: np.ndarray | None = None

    def epoch(self, number: int, block: int) -> MicroBatches:
        """The micro-batches of an epoch, in the order in which training takes them.

        Rows of similar length share a micro-batch, and `block` micro-batches of similar length follow one another, so that all
        ranks and accumulation turns of a step take about as long. The remainder that fills no block comes last.
        """
        draw = keyed(self.seed, number, "plan")
        rows = draw.permutation(self._occurring(number))
        firsts = []
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            blurred = self.lengths[window] * (1 + JITTER * (draw.random(len(window)) - 0.5))
            rows[start : start + WINDOW] = window = window[np.argsort(blurred, kind="stable")]
            firsts.append(start + cut(self.lengths[window], self.budget))
        count = sum(map(len, firsts))
        full, rest = divmod(count, block)
        at = int(draw.integers(full + 1)) * block
        order = np.concatenate(
            [np.arange(at), np.arange(at + rest, count), np.arange(at, at + rest)]
        )
        blocks = order[: full * block].reshape(full, block)[draw.permutation(full)]
        return MicroBatches(
            rows, np.concatenate(firsts), np.concatenate([blocks.ravel(), order[full * block :]])
        )

    def in_order(self) -> MicroBatches:
        """The micro-batches of a validation: sorted by length, always the same."""
        rows = np.argsort(self.lengths, kind="stable")
        firsts = cut(self.lengths[rows], self.budget)
        return MicroBatches(rows, firsts, np.arange(len(firsts)))

    def padding(self) -> float:
        """The share of padding, 0 to 1, in an epoch of the first rows."""
        lengths = self.lengths[:WINDOW]
        rows = BatchSampler(lengths=lengths, budget=self.budget, seed=self.seed).epoch(0, 1)
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in rows)
        return 1 - float(lengths.sum()) / max(padded, 1)

    def _occurring(self, number: int) -> np.ndarray:
        """The rows of an epoch: with a weight of 1.5, a row once or twice, by a draw of the epoch and its place."""
        rows = np.arange(len(self.lengths))
        if self.repeats is None:
            return rows
        chance = keyed(self.seed, number, "weights").random(len(rows))
        times = (self.repeats + chance).astype(int)
        return np.repeat(rows, times) if times.any() else rows[[int(chance.argmax())]]
