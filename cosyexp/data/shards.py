"""Parquet shards with the original's columns, and the lists that name them.

Columns: utt, audio_data (the bytes of an audio file), wav (its path), text, spk, utt_embedding, spk_embedding (lists of floats),
speech_token (list of ints); optional: instruct, reject_speech_token.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosyexp.errors import UserError
from cosyexp.run.files import replace_file

COLUMNS = pa.schema(
    [
        ("utt", pa.string()),
        ("audio_data", pa.binary()),
        ("wav", pa.string()),
        ("text", pa.string()),
        ("spk", pa.string()),
        ("utt_embedding", pa.list_(pa.float32())),
        ("spk_embedding", pa.list_(pa.float32())),
        ("speech_token", pa.list_(pa.int32())),
    ]
)
OPTIONAL = pa.schema([("instruct", pa.string()), ("reject_speech_token", pa.list_(pa.int32()))])


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], note: str | None = None) -> None:
    """Writes one shard, whole or not at all, with the optional columns that its rows have, and perhaps a note of how it was made."""
    schema = pa.schema(
        [*COLUMNS, *(column for column in OPTIONAL if any(column.name in row for row in rows))]
    )
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    if note is not None:
        table = table.replace_schema_metadata({"note": note})
    with replace_file(path) as file:
        pq.write_table(table, file)


def open_shard(path: Path) -> pq.ParquetFile:
    """Opens a shard; UserError where it is missing or not a whole parquet file."""
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"there is no data file {path}: prepare it, or correct its list") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is no readable parquet file (half-written?), prepare it again: {error}"
        ) from None


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a shard with those of `columns` that it has."""
    file = open_shard(path)
    present = [name for name in columns if name in file.schema_arrow.names]
    if "utt" not in present:
        raise UserError(f"{path} has no column 'utt': it is no data set of the CosyVoice kind")
    kind = file.schema_arrow.field("utt").type
    if not any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
    ):
        raise UserError(
            f"the column 'utt' of {path} holds {kind} instead of text: write it anew with ids that are text"
        )
    try:
        for batch in file.iter_batches(batch_size=64, columns=present):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged, prepare it again: {error}") from None


def read_note(path: Path) -> str:
    """The note that a shard was written with."""
    note: bytes = (open_shard(path).schema_arrow.metadata or {}).get(b"note", b"")
    return note.decode()


def read_list(path: str) -> list[Path]:
    """The shards that a list file names, one path a line, or the one shard that `path` is.

    A relative path in a list is looked for beside the list, then from the current folder.
    """
    listed = Path(path).expanduser()
    if listed.suffix == ".parquet":
        return [listed]
    try:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise UserError(
            f"there is no data list {path}: name a list of parquet files, or prepare one"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(
            f"{path} is no data list: it must be a text file with one parquet path a line"
        ) from None
    shards = [
        listed.parent / line if (listed.parent / line).exists() else Path(line).expanduser()
        for line in lines
        if line
    ]
    if not shards:
        raise UserError(f"the data list {path} is empty: it must name one parquet file a line")
    return shards


def first_rows(shards: list[Path], limit: int | None) -> list[Path]:
    """As many of the shards as hold the first `limit` rows."""
    if limit is None:
        return shards
    counts = np.cumsum([open_shard(shard).metadata.num_rows for shard in shards[:limit]])
    return shards[: int(np.searchsorted(counts, limit)) + 1]


def write_list(path: Path, shards: Sequence[Path]) -> None:
    """Writes a list of shards by paths relative to it."""
    with replace_file(path) as file:
        file.write("".join(f"{os.path.relpath(shard, path.parent)}\n" for shard in shards).encode())
