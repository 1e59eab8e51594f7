"""The plan of an epoch: which utterances go into which micro-batch, and in which order the steps take them."""

from dataclasses import dataclass

import numpy as np

from cosyexp.data.draws import keyed

JITTER = 0.1  # lengths are blurred by up to this share before sorting, so that epochs group the rows differently
WINDOW = 100_000  # rows sorted by length at a time


def cut(lengths: np.ndarray, budget: int) -> list[slice]:
    """Cuts a sequence of rows into runs whose padded size, rows x longest, stays within `budget`; a row above it stands alone."""
    runs, start, longest = [], 0, 0
    for i, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > budget:
            runs.append(slice(start, i))
            start, longest = i, length
    return [*runs, slice(start, len(lengths))] if len(lengths) else []


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pure function of (seed, epoch, lengths): nothing is drawn while training, so a position is the whole state.

    lengths: of each row, in the unit the model pads (tokens, frames).
    budget: rows x longest row of a micro-batch stays within it.
    """

    lengths: np.ndarray
    budget: int
    seed: int

    def epoch(self, number: int, block: int) -> list[np.ndarray]:
        """The micro-batches of an epoch, arrays of row numbers, in the order in which training takes them.

        Rows of similar length share a micro-batch, and `block` micro-batches of similar length follow one another, so that all
        ranks and accumulation turns of a step take about as long. Every row occurs once. The remainder that fills no block
        comes last.
        """
        draw = keyed(self.seed, number, "plan")
        order = draw.permutation(len(self.lengths))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), WINDOW):
            rows = order[start : start + WINDOW]
            blurred = self.lengths[rows] * (1 + JITTER * (draw.random(len(rows)) - 0.5))
            rows = rows[np.argsort(blurred, kind="stable")]
            batches += [rows[run] for run in cut(self.lengths[rows], self.budget)]
        rest = len(batches) % block
        at = int(draw.integers(len(batches) // block + 1)) * block
        batches = batches[:at] + batches[at + rest :] + batches[at : at + rest]
        full = len(batches) // block
        return [b for i in draw.permutation(full) for b in batches[i * block : (i + 1) * block]] + batches[full * block :]

    def in_order(self) -> list[np.ndarray]:
        """The micro-batches of a validation: sorted by length, always the same."""
        rows = np.argsort(self.lengths, kind="stable")
        return [rows[run] for run in cut(self.lengths[rows], self.budget)]

    def padding(self) -> float:
        """The share of padding in the first epoch, 0 to 1."""
        batches = self.epoch(0, 1)
        padded = sum(len(rows) * int(self.lengths[rows].max()) for rows in batches)
        return 1 - float(self.lengths.sum()) / max(padded, 1)
