"""Opens Arrow files, whose tables stay on disk until their values are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from cosyexp.run.documents import open_regular


@contextmanager
def open_arrow(path: Path) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """Memory-maps an Arrow file.

    Raises:
        OSError: the file cannot be opened.
        DamagedFileError: it is not a regular file; to open a FIFO would wait.
        pa.ArrowException: it is not a complete Arrow file.
    """
    open_regular(path).close()
    with pa.memory_map(str(path)) as file:
        yield pa.ipc.open_file(file)
