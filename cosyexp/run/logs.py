"""Handlers for the `cosyexp` logger: the console, above the progress bar, and a file of the run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cosyexp.run.files import append

LOGGER = logging.getLogger("cosyexp")


class AboveTheBar(logging.Handler):
    """Prints log records above tqdm's progress bar, without breaking it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        tqdm.write(self.format(record))


class RunLog(logging.FileHandler):
    """Appends log records to a file of a run, which is created with the first record."""

    def _open(self) -> Any:
        return append(Path(self.baseFilename))


@contextmanager
def console(level: int = logging.INFO) -> Iterator[None]:
    """Shows log records of at least `level` on the console within the block."""
    handler = AboveTheBar(level)
    with _attached(handler):
        yield


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends all log records to a file, with time and level, within the block."""
    handler = RunLog(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with _attached(handler):
        yield


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
