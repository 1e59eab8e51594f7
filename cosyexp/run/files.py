"""Files that are there whole or not at all."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, that takes the place of `path` once it is whole and on the disk."""
    with replacement(path) as part, open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Where to write a file, and bring it onto the disk, that then takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made where it is missing: another process that wants it waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")
