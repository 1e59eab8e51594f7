"""Shard indexes: which rows of a shard a collator can use, and how long they are.

Training reads these small files at its start; the fields themselves are opened when one of their
rows is read.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cosyexp.data.arrow import open_arrow
from cosyexp.data.cache import CachedField, cache_path, ensure
from cosyexp.data.fields import Field
from cosyexp.data.fingerprint import fingerprint, fingerprints, keep_fingerprint
from cosyexp.run.documents import DamagedFileError
from cosyexp.run.files import below, replace_file

Fields = Mapping[str, Field]


class Index(NamedTuple):
    """The index of one shard; all arrays are (rows,).

    Attributes:
        keys: hash of each utterance's id.
        good: whether every field could be computed.
        faulty: whether a field could not be computed, other than for a column that a row may lack.
        sizes: time steps of each field, by its name in the collator.
    """

    keys: np.ndarray
    good: np.ndarray
    faulty: np.ndarray
    sizes: Mapping[str, np.ndarray]


def read_indexes(shards: Sequence[Path], fields: Fields, processes: int) -> list[Index]:
    """Returns the index of every shard; missing fields and indexes are computed first.

    Args:
        shards: paths of the parquet files.
        fields: fields by their names in the collator.
        processes: processes that compute missing fields.
    """
    fingerprints(shards, processes)  # reads what is new, several files at a time
    existing = [_read(shard, fields) for shard in shards]
    missing = [shard for shard, index in zip(shards, existing, strict=True) if index is None]
    ensure(missing, list(fields.values()), processes)
    for shard in missing:
        _write(shard, fields)
    return [
        index or _known(_read(shard, fields)) for shard, index in zip(shards, existing, strict=True)
    ]


def index_path(shard: Path, fields: Fields) -> Path:
    """Returns the path of the index of a shard for a set of fields."""
    names = sorted((name, cache_path(shard, field).name) for name, field in fields.items())
    key = hashlib.blake2b(repr(names).encode(), digest_size=4).hexdigest()
    return shard.with_suffix(".fields") / f"index-{key}.arrow"


def _read(shard: Path, fields: Fields) -> Index | None:
    """Returns None if there is no intact index of this shard, or a field is missing."""
    path = index_path(shard, fields)
    try:
        with open_arrow(path) as reader:
            table = reader.read_all()
        if table.schema.metadata[b"shard"] != fingerprint(shard) or not all(
            cache_path(shard, f).is_file() for f in fields.values()
        ):
            return None
        columns = {name: table[name].to_numpy() for name in table.column_names}
        if table.schema.metadata[b"checksum"] != _checksum(columns):
            return None
        return Index(
            columns.pop("key"),
            columns.pop("good"),
            columns.pop("faulty"),
            {name: columns[f"size_{name}"] for name in fields},
        )
    except (OSError, pa.ArrowException, DamagedFileError, KeyError, TypeError, ValueError):
        return None


def _checksum(columns: Mapping[str, np.ndarray]) -> bytes:
    """Returns a checksum of an index: a flipped bit would make other batches."""
    total = 0
    for name in sorted(columns):
        total = zlib.crc32(np.ascontiguousarray(columns[name]).tobytes(), total)
    return f"{total:08x}".encode()


def _write(shard: Path, fields: Fields) -> None:
    opened = {name: CachedField(shard, field) for name, field in fields.items()}
    utts = next(iter(opened.values())).utts.to_pylist()
    columns = {
        "key": np.array(
            [
                int.from_bytes(hashlib.blake2b(utt.encode(), digest_size=8).digest(), "little")
                for utt in utts
            ],
            np.uint64,
        ),
        "good": np.all([field.good for field in opened.values()], axis=0),
        "faulty": np.any([field.faulty for field in opened.values()], axis=0),
        **{f"size_{name}": field.lengths.astype(np.int32) for name, field in opened.items()},
    }
    notes = {"shard": fingerprint(shard), "checksum": _checksum(columns)}
    table = pa.table(columns).replace_schema_metadata(notes)
    path = below(shard.parent, f"{shard.stem}.fields", index_path(shard, fields).name)
    with (
        replace_file(path) as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    keep_fingerprint(shard)


def _known(index: Index | None) -> Index:
    assert index is not None
    return index
