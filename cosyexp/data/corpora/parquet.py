"""A corpus in parquet or Arrow files that hold the audio: of Hugging Face, or of CosyVoice.

The audio is a column of bytes, or of structures `{bytes, path}` as `datasets` writes them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cosyexp.data.corpora.base import ContainerCorpus, Recording
from cosyexp.data.corpora.columns import Columns, columns_of
from cosyexp.data.corpora.names import AudioFinder, without_suffix
from cosyexp.data.corpora.recordings import recording
from cosyexp.errors import UserError, reason
from cosyexp.registry import register
from cosyexp.run.documents import DamagedFileError, open_regular

ROWS = 32  # that are read at a time


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Parquet(ContainerCorpus):
    """A corpus in parquet or Arrow files."""

    def __str__(self) -> str:
        path, _ = next(self.paths())
        return f"tables with audio, {self.described}: {self._columns(path)}"

    def _columns(self, path: Path) -> Columns:
        with reading(path):
            return columns_of(schema_of(path).names, self.columns, str(path))

    def __len__(self) -> int:
        total = 0
        for path, _ in self.paths():
            with reading(path):
                total += rows_of(path)
        return total

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of the files."""
        for path, held_out in self.paths():
            columns, number, find = self._columns(path), 0, AudioFinder(path.parent)
            with reading(path):
                for batch in batches(path, sorted({str(key) for key in columns.keys.values()})):
                    for row in batch.to_pylist():
                        number += 1
                        cells = columns.cells(row)
                        audio, name = audio_of(cells.get("audio"))
                        yield recording(
                            cells,
                            where=f"row {number} of {path}",
                            fault="" if audio or name else "it has no audio",
                            utt=Path(without_suffix(name)).name or f"{path.stem}:{number}",
                            speaker=self.name,
                            path=str(path) if audio else find(name) if name else "",
                            audio=audio,
                            held_out=held_out,
                        )


def audio_of(cell: Any) -> tuple[bytes | None, str]:
    """Returns the bytes of an audio cell, if it has any, and the path that it names."""
    if isinstance(cell, Mapping):
        content, path = cell.get("bytes"), cell.get("path")
    else:
        content, path = cell, cell
    name = path if isinstance(path, str) else ""
    return (content, name) if isinstance(content, bytes) and content else (None, name)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises in the block into a sentence.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        open_regular(path).close()
        yield
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: correct corpus.root=") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, DamagedFileError) as error:
        why = getattr(error, "reason", None) or reason(error)
        raise UserError(f"{path} is not a readable parquet or Arrow file: {why}") from None


def is_parquet(path: Path) -> bool:
    """Returns whether a file is in parquet, as its first bytes say."""
    with open_regular(path) as file:
        return file.read(4) == b"PAR1"


def schema_of(path: Path) -> pa.Schema:
    """Returns the columns of a file."""
    if is_parquet(path):
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as file:
        return open_ipc(file).schema


def rows_of(path: Path) -> int:
    """Returns the number of rows of a file."""
    if is_parquet(path):
        return int(pq.read_metadata(path).num_rows)
    with pa.memory_map(str(path)) as file:
        return sum(batch.num_rows for batch in ipc_batches(open_ipc(file)))


def batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file, a few at a time."""
    if is_parquet(path):
        yield from pq.ParquetFile(path).iter_batches(batch_size=ROWS, columns=columns)
        return
    with pa.memory_map(str(path)) as file:
        for batch in ipc_batches(open_ipc(file)):
            chosen = batch.select(columns)
            chosen.validate(full=True)  # pyarrow would follow wrong offsets out of the file
            for start in range(0, batch.num_rows, ROWS):
                yield chosen.slice(start, ROWS)


def open_ipc(file: pa.MemoryMappedFile) -> Any:
    """Opens an Arrow file, or an Arrow stream, which `save_to_disk` writes."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def ipc_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Yields the batches of an Arrow file or stream."""
    if isinstance(opened, pa.ipc.RecordBatchFileReader):
        yield from map(opened.get_batch, range(opened.num_record_batches))
    else:
        yield from opened
