"""The cache of fields: each is computed once per shard and memory-mapped afterwards.

The folder `x.fields` next to `x.parquet` has an Arrow file for each field. The file records the
fingerprint of the shard, so that the fields of a shard that was prepared again are computed again.
A row for which the field cannot be computed is empty there, and the reason is in another column.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from cosyexp.data.arrow import open_arrow
from cosyexp.data.fields import Field, cache_name
from cosyexp.data.fingerprint import fingerprint
from cosyexp.data.shards import read_rows
from cosyexp.data.utterance import LACKS, Utterance
from cosyexp.errors import UserError, reason
from cosyexp.run.documents import DamagedFileError
from cosyexp.run.files import below, replace_file

log = logging.getLogger(__name__)


def cache_path(shard: Path, field: Field) -> Path:
    """Returns the path of the file that caches a field of a shard."""
    return shard.with_suffix(".fields") / cache_name(field)


def is_cached(shard: Path, field: Field) -> bool:
    """Returns whether a field of a shard is cached, and the shard has not changed since."""
    path = cache_path(shard, field)
    try:
        with open_arrow(path) as reader:
            return bool(reader.schema.metadata[b"shard"] == fingerprint(shard))
    except (OSError, pa.ArrowException, DamagedFileError, KeyError, TypeError):
        return False


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread inside the context.

    Features are then the same to the last bit wherever they are computed, and parallel processes do
    not oversubscribe the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def compute_shard(shard: Path, fields: Sequence[Field]) -> None:
    """Computes fields of a shard and writes their files.

    Raises:
        UserError: if the shard cannot be read, or a file that a field needs is missing.
    """
    utts: list[str] = []
    values: list[list[np.ndarray]] = [[] for _ in fields]
    reasons: list[list[str | None]] = [[] for _ in fields]
    for row in read_rows(
        shard, ["utt", *sorted({column for field in fields for column in field.columns})]
    ):
        utterance = Utterance(row)
        # A row without an id is named by its position.
        utts.append(row["utt"] or f"{shard.stem}:{len(utts)}")
        for i, field in enumerate(fields):
            try:
                values[i].append(field(utterance))
                reasons[i].append(None)
            except UserError:  # a ValueError too, but not a fault of the row
                raise
            except ValueError as error:
                values[i].append(np.empty(0, field.dtype))
                reasons[i].append(str(error))
    for i, field in enumerate(fields):
        offsets = np.cumsum([0, *(len(value) for value in values[i])], dtype=np.int64)
        flat = np.concatenate([np.empty(0, field.dtype), *values[i]])
        columns: dict[str, Any] = {
            "utt": pa.array(utts, pa.string()),
            "values": pa.LargeListArray.from_arrays(offsets, pa.array(flat)),
            "reason": pa.array(reasons[i], pa.string()),
        }
        table = pa.table(columns).replace_schema_metadata({"shard": fingerprint(shard)})
        path = below(shard.parent, f"{shard.stem}.fields", cache_path(shard, field).name)
        with (
            replace_file(path) as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)


def ensure(shards: Sequence[Path], fields: Sequence[Field], processes: int) -> None:
    """Computes the fields that are not cached yet, several shards in parallel, with a progress bar.

    Args:
        shards: paths of the parquet files.
        fields: the fields that each shard must have.
        processes: number of processes; 1 computes in the current process.
    """
    missing = [
        (shard, [field for field in fields if not is_cached(shard, field)]) for shard in shards
    ]
    missing = [(shard, absent) for shard, absent in missing if absent]
    if not missing:
        return
    names = ", ".join(
        sorted({cache_name(field).split("-")[0] for _, absent in missing for field in absent})
    )
    log.info("computing %s of %d shards, once", names, len(missing))
    to_compute, wanted = zip(*missing, strict=True)
    bar = tqdm(
        total=len(missing), unit="shard", desc="features", leave=False, delay=1, disable=None
    )
    if processes <= 1 or len(missing) == 1:
        for shard, absent in missing:
            compute_shard(shard, absent)
            bar.update()
    else:
        with ProcessPoolExecutor(
            min(processes, len(missing)), mp_context=get_context("spawn")
        ) as pool:
            for _ in pool.map(compute_shard, to_compute, wanted):
                bar.update()
    bar.close()


def _read(path: Path) -> pa.Table:
    """Memory-maps a file of the cache; pyarrow would follow wrong offsets out of the file."""
    with open_arrow(path) as reader:
        table = reader.read_all()
    table.validate()
    for name in ("utt", "reason"):
        table[name].validate(full=True)
    return table


class CachedField:
    """A cached field of a shard, whose values stay on disk until they are read.

    Attributes:
        utts: ids of the utterances, (rows,).
        reasons: why a row cannot be used; null where it can, (rows,).
        width: numbers per time step.
        lengths: time steps of each row, (rows,).
        good: whether a row can be used, (rows,).
        faulty: whether a row has a fault, other than lacking what it may lack, (rows,).

    Raises:
        UserError: if the file is damaged.
    """

    def __init__(self, shard: Path, field: Field) -> None:
        self._where = (shard, field)
        path = cache_path(shard, field)
        try:
            table = _read(path)
            lists = (
                table["values"].combine_chunks()
                if table["values"].num_chunks != 1
                else table["values"].chunk(0)
            )
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({reason(error)}): remove it and repeat the command, which "
                f"computes it again"
            ) from None
        self.utts, self.reasons, self.width = table["utt"], table["reason"], field.width
        self._offsets = lists.offsets.to_numpy()
        self._values = lists.values.to_numpy()
        self.lengths = np.diff(self._offsets) // self.width
        self.good = self.reasons.is_null().to_numpy()
        lacking = pc.starts_with(self.reasons.fill_null(""), LACKS).to_numpy() & getattr(
            field, "may_lack", False
        )
        self.faulty = ~self.good & ~lacking

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns the values of a row, (time * width,), read-only."""
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedField, self._where
