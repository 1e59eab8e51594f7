"""Where log lines go: to the console, above the progress bar, and to a file of the run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

LOGGER = logging.getLogger("cosyexp")


class AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


@contextmanager
def console(level: int = logging.INFO) -> Iterator[None]:
    """Within it, lines of this level and above come to the console."""
    handler = AboveTheBar(level)
    with _attached(handler):
        yield


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Within it, every line is appended to a file, with its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
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
