"""Parquet shards with the columns of the original CosyVoice, and the data lists that name them.

Columns: utt (id), audio_data (bytes of an audio file), wav (its path), text, spk (speaker),
utt_embedding and spk_embedding (lists of floats), speech_token (list of ints); optional: instruct,
reject_speech_token.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosyexp.errors import UserError, reason
from cosyexp.run.documents import DamagedFileError, open_regular, read_lines
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
    """Writes one shard, complete or not at all.

    Args:
        path: of the parquet file.
        rows: values by column; an optional column is written if any row has it.
        note: kept in the metadata of the file, see `read_note`; None: no note.
    """
    schema = pa.schema(
        [*COLUMNS, *(column for column in OPTIONAL if any(column.name in row for row in rows))]
    )
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    if note is not None:
        table = table.replace_schema_metadata({"note": note})
    with replace_file(path) as file:
        pq.write_table(table, file)


def open_shard(path: Path) -> pq.ParquetFile:
    """Opens a shard.

    Raises:
        UserError: if the file is missing or is not a complete parquet file.
    """
    try:
        open_regular(path).close()
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"there is no data file {path}: prepare it, or correct its list") from None
    except (pa.ArrowException, OSError, DamagedFileError) as error:
        raise UserError(
            f"{path} is not a readable parquet file (half-written?), prepare it again: "
            f"{reason(error)}"
        ) from None


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a shard, with those of the columns that it has.

    Raises:
        UserError: if the file cannot be read, or has no column 'utt' of strings.
    """
    file = open_shard(path)
    present = [name for name in columns if name in file.schema_arrow.names]
    if "utt" not in present:
        raise UserError(
            f"{path} has no column 'utt', so it is not a CosyVoice data set: name another file"
        )
    kind = file.schema_arrow.field("utt").type
    if not any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
    ):
        raise UserError(
            f"the column 'utt' of {path} has the type {kind} instead of string: "
            "write the file again with string ids"
        )
    try:
        for batch in file.iter_batches(batch_size=64, columns=present):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, prepare it again: {reason(error)}") from None


def read_note(path: Path) -> str:
    """Returns the note that a shard was written with; empty if there is none."""
    note: bytes = (open_shard(path).schema_arrow.metadata or {}).get(b"note", b"")
    return note.decode()


def read_list(path: str) -> list[Path]:
    """Returns the shards of a data list.

    Args:
        path: a text file with one path per line, or a single parquet file. A relative path in a
            list is looked up in the folder of the list, then in the current folder.

    Raises:
        UserError: if there is no such list, or it is empty or not a text file.
    """
    listed = Path(path).expanduser()
    if listed.suffix == ".parquet":
        return [listed]
    try:
        lines = [line.strip() for line in read_lines(listed)]
    except FileNotFoundError:
        raise UserError(
            f"there is no data list {path}: name a list of parquet files, or prepare one"
        ) from None
    except DamagedFileError:
        raise UserError(
            f"{path} is not a data list: name a text file with one parquet path per line"
        ) from None
    shards = [
        listed.parent / line if (listed.parent / line).exists() else Path(os.path.expanduser(line))
        for line in lines
        if line
    ]
    if not shards:
        raise UserError(f"the data list {path} is empty: write one parquet path per line")
    return shards


def first_rows(shards: list[Path], limit: int | None) -> list[Path]:
    """Returns as many of the shards as hold the first `limit` rows; None: all."""
    if limit is None:
        return shards
    counts = np.cumsum([open_shard(shard).metadata.num_rows for shard in shards[:limit]])
    return shards[: int(np.searchsorted(counts, limit)) + 1]


def write_list(path: Path, shards: Sequence[Path]) -> None:
    """Writes a data list, with the paths of the shards relative to its folder."""
    with replace_file(path) as file:
        file.write("".join(f"{os.path.relpath(shard, path.parent)}\n" for shard in shards).encode())
