"""The usable utterances of a data set, as a collator reads them."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from cosyexp.data.batch import Batch
from cosyexp.data.cache import CachedField
from cosyexp.data.collators.base import Collator, Row
from cosyexp.data.draws import Draws
from cosyexp.data.index import Index, read_indexes
from cosyexp.data.shards import first_rows, read_list
from cosyexp.errors import UserError

log = logging.getLogger(__name__)
OPEN = 500  # shards whose files are kept open
NAMED = 100  # utterances that are named in one line of the log


class Dataset:
    """Rows are counted over all shards, without the bad ones, which are named in the log.

    lists: data lists (or single parquet files), their shards one after another. repeats: of the rows of each list, how often they
    occur in an epoch; None: once.
    max_bad: the share of rows that may be bad. longest: rows that cost more are left out. limit: only so many rows are read.
    """

    def __init__(
        self,
        lists: Sequence[str],
        collator: Collator,
        *,
        max_bad: float,
        processes: int,
        repeats: Sequence[float] | None = None,
        longest: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.name, self.collator = ", ".join(lists), collator
        if repeats is not None and (
            len(repeats) != len(lists) or not all(0 < weight < math.inf for weight in repeats)
        ):
            raise UserError(
                f"data.repeats={list(repeats)} must be a number above 0 for each of the {len(lists)} lists in data.train"
            )
        listed = [read_list(path) for path in lists]
        self.shards = first_rows(list(chain.from_iterable(listed)), limit)
        indexes = read_indexes(self.shards, collator.fields, processes)
        self.extra: Mapping[str, np.ndarray] = {}  # more fields, computed since; by row
        self._opened: dict[int, dict[str, CachedField]] = {}
        self._places, self.lengths = self._usable(indexes, max_bad, limit)
        if longest is not None:
            self._leave_out(self.lengths > longest, f"are longer than data.longest={longest}")
        self._tell_of_doubles(indexes)
        self.repeats = None
        if repeats is not None:
            of_shards = np.repeat(np.array(repeats, float), [len(shards) for shards in listed])[
                : len(self.shards)
            ]
            self.repeats = of_shards[self._places[:, 0]]

    def _usable(
        self, indexes: Sequence[Index], max_bad: float, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, 2) shard and row of each usable utterance, and their lengths."""
        places, lengths = [], []
        total = faulty = bad = 0
        faults: list[str] = []
        lacking: list[str] = []
        for shard, index in enumerate(indexes):
            part = slice(None if limit is None else limit - total)
            good, fault = index.good[part], index.faulty[part]
            for wrong, named in ((fault, faults), (~good & ~fault, lacking)):
                named += [
                    self._reason(shard, row) for row in np.flatnonzero(wrong)[: NAMED - len(named)]
                ]
            rows = np.flatnonzero(good)
            places.append(np.stack([np.full_like(rows, shard), rows], axis=1).astype(np.int32))
            lengths.append(
                self.collator.length(
                    {name: sizes[rows] for name, sizes in index.sizes.items()}
                ).astype(np.int64)
            )
            total, faulty, bad = (
                total + len(good),
                faulty + int(fault.sum()),
                bad + len(good) - len(rows),
            )
        if named := (faults + lacking)[:NAMED]:
            log.warning(
                "%s: %d of %d utterances left out: %s%s",
                self.name,
                bad,
                total,
                "; ".join(named),
                "; ..." * (bad > len(named)),
            )
        if faulty > max_bad * total:
            raise UserError(
                f"{faulty} of {total} utterances in {self.name} cannot be used, more than data.max_bad={max_bad} allows; "
                f"the first is {faults[0]}"
            )
        if total == bad:
            reason = f" that can be used, the first is {named[0]}" if named else ""
            remedy = (
                "cosyexp.prefer makes pairs, see docs/dpo.md"
                if lacking
                else "prepare the data again, or name another list"
            )
            raise UserError(f"{self.name} holds no utterance{reason}: {remedy}")
        return np.concatenate(places), np.concatenate(lengths)

    def _reason(self, shard: int, row: int) -> str:
        """Why a row cannot be used, by its id."""
        field = min(
            (field for field in self._open(shard).values() if not field.good[row]),
            key=lambda field: not field.faulty[row],
        )
        return f"{field.utts[row].as_py()}: {field.reasons[row].as_py()}"

    def _leave_out(self, out: np.ndarray, why: str) -> None:
        if not out.any():
            return
        log.warning(
            "%s: %d of %d utterances %s and are left out: %s",
            self.name,
            out.sum(),
            len(out),
            why,
            self._names(np.flatnonzero(out)),
        )
        if out.all():
            raise UserError(f"all utterances in {self.name} {why}: nothing is left")
        self._places, self.lengths = self._places[~out], self.lengths[~out]

    def _tell_of_doubles(self, indexes: Sequence[Index]) -> None:
        """Utterances of one id draw the same random numbers, and are mostly the same recording twice."""
        begins = np.cumsum([0, *(len(index.keys) for index in indexes)])
        keys = np.concatenate([index.keys for index in indexes])[
            begins[self._places[:, 0]] + self._places[:, 1]
        ]
        order = np.argsort(keys, kind="stable")
        again = order[1:][keys[order[1:]] == keys[order[:-1]]]
        if len(again):
            log.warning(
                "%s: %d utterances have an id that occurs before: %s",
                self.name,
                len(again),
                self._names(np.sort(again)),
            )

    def _names(self, rows: np.ndarray) -> str:
        names = [self.row(int(row))[0] for row in rows[:NAMED]]
        return ", ".join(names) + (", ..." if len(rows) > NAMED else "")

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> tuple[str, Row]:
        """The id and the fields of an utterance."""
        shard, row = self._places[index].tolist()
        opened = self._open(shard)
        utt = next(iter(opened.values())).utts[row].as_py()
        fields = {name: field[row].reshape(-1, field.width).T for name, field in opened.items()}
        return utt, {**fields, **{name: values[index] for name, values in self.extra.items()}}

    def batch(self, rows: Sequence[int], draws: Draws) -> Batch:
        utts, fields = zip(*(self.row(index) for index in rows), strict=True)
        return self.collator.collate(utts, fields, draws)

    def _open(self, shard: int) -> dict[str, CachedField]:
        """The fields of a shard, memory-mapped; those that were read least recently are closed."""
        opened = self._opened.pop(shard, None)
        if opened is None:
            opened = {
                name: CachedField(self.shards[shard], field)
                for name, field in self.collator.fields.items()
            }
        self._opened[shard] = opened
        if len(self._opened) > OPEN:
            del self._opened[next(iter(self._opened))]
        return opened
