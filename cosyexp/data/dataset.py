"""The dataset: the usable utterances of one or several data lists, with their fields."""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from cosyexp.data.batch import Batch
from cosyexp.data.cache import CachedField
from cosyexp.data.collators.base import Collator, Row
from cosyexp.data.draws import Draws
from cosyexp.data.fields import cache_name
from cosyexp.data.fingerprint import fingerprint
from cosyexp.data.index import Index, read_indexes
from cosyexp.data.shards import first_rows, read_list
from cosyexp.errors import UserError

log = logging.getLogger(__name__)
OPEN = 500  # shards whose files are kept open
NAMED = 100  # maximum number of utterances that one log line names


class Dataset:
    """Map-style dataset over parquet shards, whose rows are the utterances that a collator can use.

    Rows are numbered across all shards. Utterances that cannot be used are left out and named in
    the log.

    Args:
        lists: data lists or single parquet files; their shards follow one another.
        collator: names the fields to read, and makes batches of them.
        max_bad: maximum share of utterances with a fault, from 0 to 1.
        processes: processes that compute fields that are not cached yet.
        repeats: how often the rows of each list occur in an epoch; None: once.
        longest: leaves out utterances that cost more, see `Collator.length`; None: no limit.
        limit: reads only so many rows; None: all.

    Attributes:
        lengths: cost of each row, (rows,) int64.
        repeats: how often each row occurs in an epoch, (rows,); None: once.
        extra: more fields by name, computed after the data were read, indexed by row.

    Raises:
        UserError: if a list or a shard cannot be read, `repeats` does not fit the lists, more than
            `max_bad` of the utterances have a fault, or no utterance is left.
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
            len(repeats) != len(lists) or not all(0 < repeat < math.inf for repeat in repeats)
        ):
            raise UserError(
                f"data.repeats={list(repeats)} does not fit data.train: "
                f"give a number above 0 for each of the {len(lists)} lists"
            )
        shards_of_lists = [read_list(path) for path in lists]
        self.shards = first_rows(list(chain.from_iterable(shards_of_lists)), limit)
        indexes = read_indexes(self.shards, collator.fields, processes)
        self.extra: Mapping[str, np.ndarray] = {}
        self._opened: dict[int, dict[str, CachedField]] = {}
        self._locations, self.lengths = self._usable(indexes, max_bad, limit)
        if longest is not None:
            self._leave_out(self.lengths > longest, f"are longer than data.longest={longest}")
        self._warn_of_duplicates(indexes)
        self.repeats = None
        if repeats is not None:
            counts = [len(shards) for shards in shards_of_lists]
            of_shards = np.repeat(np.array(repeats, float), counts)[: len(self.shards)]
            self.repeats = of_shards[self._locations[:, 0]]

    def _usable(
        self, indexes: Sequence[Index], max_bad: float, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (rows, 2) shard and row of each usable utterance, and their lengths (rows,)."""
        locations, lengths = [], []
        total = faulty = bad = 0
        faults: list[str] = []
        lacking: list[str] = []
        for shard, index in enumerate(indexes):
            part = slice(None if limit is None else limit - total)
            good, fault = index.good[part], index.faulty[part]
            for selected, reasons in ((fault, faults), (~good & ~fault, lacking)):
                reasons += [
                    self._reason(shard, row)
                    for row in np.flatnonzero(selected)[: NAMED - len(reasons)]
                ]
            rows = np.flatnonzero(good)
            locations.append(np.stack([np.full_like(rows, shard), rows], axis=1).astype(np.int32))
            sizes = {name: size[rows] for name, size in index.sizes.items()}
            lengths.append(self.collator.length(sizes).astype(np.int64))
            total += len(good)
            faulty += int(fault.sum())
            bad += len(good) - len(rows)
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
                f"{faulty} of {total} utterances in {self.name} cannot be used, more than "
                f"data.max_bad={max_bad} allows: correct the data, or raise data.max_bad; "
                f"the first is {faults[0]}"
            )
        if total == bad:
            example = f" (the first is {named[0]})" if named else ""
            remedy = (
                "make preference pairs with cosyexp.prefer, see docs/dpo.md"
                if lacking
                else "prepare the data again, or name another list"
            )
            raise UserError(f"{self.name} has no usable utterance{example}: {remedy}")
        return np.concatenate(locations), np.concatenate(lengths)

    def _reason(self, shard: int, row: int) -> str:
        """Returns the id of an utterance and why it cannot be used."""
        field = min(
            (field for field in self._open(shard).values() if not field.good[row]),
            key=lambda field: not field.faulty[row],
        )
        return f"{field.utts[row].as_py()}: {field.reasons[row].as_py()}"

    def _leave_out(self, excluded: np.ndarray, why: str) -> None:
        if not excluded.any():
            return
        log.warning(
            "%s: %d of %d utterances %s and are left out: %s",
            self.name,
            excluded.sum(),
            len(excluded),
            why,
            self._names(np.flatnonzero(excluded)),
        )
        if excluded.all():
            raise UserError(f"all utterances in {self.name} {why}: use a larger value")
        self._locations, self.lengths = self._locations[~excluded], self.lengths[~excluded]

    def _warn_of_duplicates(self, indexes: Sequence[Index]) -> None:
        """Warns of ids that occur again, as utterances with one id draw the same random numbers."""
        begins = np.cumsum([0, *(len(index.keys) for index in indexes)])
        keys = np.concatenate([index.keys for index in indexes])[
            begins[self._locations[:, 0]] + self._locations[:, 1]
        ]
        order = np.argsort(keys, kind="stable")
        duplicates = order[1:][keys[order[1:]] == keys[order[:-1]]]
        if len(duplicates):
            log.warning(
                "%s: %d utterances have the id of an earlier one: %s",
                self.name,
                len(duplicates),
                self._names(np.sort(duplicates)),
            )

    def _names(self, rows: np.ndarray) -> str:
        names = [self.row(int(row))[0] for row in rows[:NAMED]]
        return ", ".join(names) + (", ..." if len(rows) > NAMED else "")

    def __len__(self) -> int:
        return len(self._locations)

    @cached_property
    def fingerprint(self) -> str:
        """The number of utterances, and a hash of all that is read of them.

        It covers the content of the shards in their order, the settings of the fields, and which
        rows are used. Where the files lie does not matter.
        """
        fields = self.collator.fields.items()
        content = hashlib.blake2b(digest_size=8)
        content.update(b"".join(map(fingerprint, self.shards)))
        content.update(repr(sorted((name, cache_name(field)) for name, field in fields)).encode())
        content.update(self._locations.tobytes() + self.lengths.tobytes())
        return f"{len(self)} utterances, {content.hexdigest()}"

    def row(self, index: int) -> tuple[str, Row]:
        """Returns the id and the fields of an utterance."""
        shard, row = self._locations[index].tolist()
        opened = self._open(shard)
        utt = next(iter(opened.values())).utts[row].as_py()
        fields = {name: field[row].reshape(-1, field.width).T for name, field in opened.items()}
        return utt, {**fields, **{name: values[index] for name, values in self.extra.items()}}

    def batch(self, rows: Sequence[int], draws: Draws) -> Batch:
        """Collates rows into a padded batch.

        Args:
            rows: indices of the utterances.
            draws: the random numbers of the epoch.
        """
        utts, fields = zip(*(self.row(index) for index in rows), strict=True)
        return self.collator.collate(utts, fields, draws)

    def _open(self, shard: int) -> dict[str, CachedField]:
        """Memory-maps the fields of a shard and closes those of the least recently used one."""
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
