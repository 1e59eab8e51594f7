"""The usable utterances of a data set, as a view reads them."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from cosyexp.data.batch import Batch
from cosyexp.data.cache import CachedField, ensure
from cosyexp.data.draws import Draws
from cosyexp.data.shards import read_list
from cosyexp.data.views.base import Row, View
from cosyexp.errors import UserError

log = logging.getLogger(__name__)


class Corpus:
    """Rows are counted over all shards, without the bad ones, which are named in the log.

    lists: data lists (or single parquet files), their shards one after another.
    max_bad: the share of rows that may be bad.
    """

    def __init__(self, lists: Sequence[str], view: View, *, max_bad: float, processes: int) -> None:
        self.name, self.view = ", ".join(lists), view
        shards = [shard for path in lists for shard in read_list(path)]
        ensure(shards, list(view.fields.values()), processes)
        self._caches = [{name: CachedField(shard, field) for name, field in view.fields.items()} for shard in shards]
        self._places, lengths = self._usable(max_bad)
        self.lengths = np.concatenate(lengths)
        self.extra: Mapping[str, np.ndarray] = {}  # more fields, computed since; by row

    def _usable(self, max_bad: float) -> tuple[np.ndarray, list[np.ndarray]]:
        """(rows, 2) shard and row of each usable utterance, and the lengths of each shard's."""
        places, lengths, total = [], [], 0
        faults: list[str] = []
        lacking: list[str] = []
        for shard, cache in enumerate(self._caches):
            fields = list(cache.values())
            good = np.all([field.good for field in fields], axis=0)
            for row in np.flatnonzero(~good):
                field = min((field for field in fields if not field.good[row]), key=lambda field: field.may_lack)
                (lacking if field.may_lack else faults).append(f"{field.utts[row].as_py()}: {field.reasons[row].as_py()}")
            rows = np.flatnonzero(good)
            places.append(np.stack([np.full_like(rows, shard), rows], axis=1))
            lengths.append(self.view.length({name: field.lengths[rows] for name, field in cache.items()}))
            total += len(good)
        if bad := faults + lacking:
            log.warning("%s: %d of %d utterances left out: %s", self.name, len(bad), total, "; ".join(bad))
        if len(faults) > max_bad * total:
            raise UserError(
                f"{len(faults)} of {total} utterances in {self.name} cannot be used, more than data.max_bad={max_bad} allows; "
                f"the first is {faults[0]}"
            )
        if total == len(bad):
            reason = f" that can be used, the first is {bad[0]}" if bad else ""
            raise UserError(f"{self.name} holds no utterance{reason}: prepare the data again, or name another list")
        return np.concatenate(places), lengths

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> tuple[str, Row]:
        """The id and the fields of an utterance."""
        shard, row = self._places[index].tolist()
        cache = self._caches[shard]
        utt = next(iter(cache.values())).utts[row].as_py()
        fields = {name: field[row].reshape(-1, field.width).T for name, field in cache.items()}
        return utt, {**fields, **{name: values[index] for name, values in self.extra.items()}}

    def batch(self, rows: Sequence[int], draws: Draws) -> Batch:
        utts, fields = zip(*(self.row(index) for index in rows), strict=True)
        return self.view.collate(utts, fields, draws)
