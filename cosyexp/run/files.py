"""Opens files for writing, and creates, renames and removes files; no other module does.

A file is written atomically: a reader sees either the previous file or the complete new one. What
is written stays below its folder: a symbolic link is refused, so that a run or a data set that
somebody else made cannot lead to a file of the user's. `folders.py` does the same for folders.
"""

import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import yaml

from cosyexp.errors import UserError
from cosyexp.run.documents import open_regular

COPY_SIZE = 2**30  # bytes, such as those of speaker embeddings
MODE = 0o666  # of a new file, before the umask
SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO without a reader blocks otherwise


def below(root: str | Path, *names: str) -> Path:
    """Returns the path of what may be written below a folder.

    The folder itself may be a link, or have links above it.

    Args:
        root: the folder, such as a run directory.
        names: the parts of the path below it.

    Raises:
        UserError: a part is not a plain name, or is a symbolic link.
    """
    path = Path(root)
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(f"{name!r} cannot be the name of a file in {path}: give a plain name")
        path /= name
        refuse_link(path)
    return path


def refuse_link(path: Path) -> None:
    """Checks that a path is not a symbolic link.

    Raises:
        UserError: it is one.
    """
    if path.is_symlink():
        raise UserError(
            f"{path} is a symbolic link, and nothing is written through it: remove it, or put the "
            f"file or folder itself there"
        )


def refuse_links(root: Path, *patterns: str) -> None:
    """Checks all that matches one of the patterns below a folder, before anything is written.

    Raises:
        UserError: one of the paths is a symbolic link.
    """
    for pattern in patterns:
        for path in root.glob(pattern):
            below(root, *path.relative_to(root).parts)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` when the block ends.

    The content is synced to disk first. If the block raises, `path` is left as it was.
    """
    with replacement(path) as part, create(part) as file:
        yield file


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary path whose file replaces `path` when the block ends.

    The block writes the file and syncs it to disk. If the block raises, the file is removed.
    """
    refuse_link(path)
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _make_room(part)
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file for writing, instead of one of this name, and syncs it to disk at the end.

    Raises:
        UserError: the path is a symbolic link.
    """
    _make_room(path)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE, MODE)
    with open(handle, "wb") as file:
        yield file
        file.flush()
        os.fsync(handle)


def copy_file(source: Path, path: Path, limit: int = COPY_SIZE) -> None:
    """Copies a regular file, atomically.

    Raises:
        UserError: the source is not a regular file, or is larger than `limit` bytes.
    """
    with open_regular(source, limit) as content, replace_file(path) as file:
        shutil.copyfileobj(content, file)


def append(path: Path, mode: int = MODE) -> IO[str]:
    """Opens a text file for appending, line by line; it and its folder are created if missing.

    Args:
        path: the file.
        mode: its permissions if it is new.

    Raises:
        UserError: the path is a symbolic link, or anything but a file.
    """
    refuse_link(path)
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | SAFE, mode)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a file: remove it, or give another folder")
    return open(handle, "a", buffering=1, encoding="utf-8")


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Creates a folder, with permissions before the umask, unless it is there."""
    path.mkdir(mode, parents=True, exist_ok=True)


def remove_file(path: Path) -> None:
    """Removes a file, if there is one."""
    path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes the content of a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    with replace_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, atomically; objects that JSON does not know are written as strings."""
    write_text(path, json.dumps(finite(content), indent=1, default=str, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Returns nested values with None for NaN and infinity, which JSON does not know."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_yaml(path: Path, content: Any) -> None:
    """Writes a YAML file, atomically."""
    write_text(path, to_yaml(content))


def to_yaml(content: Any) -> str:
    """Returns a value in YAML, as `documents.read_yaml` reads it: without anchors and aliases."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes a value twice where it occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns that no value is written as an alias of another."""
        return True


def _make_room(path: Path) -> None:
    """Removes a file that a killed process of this number left; raises a UserError for a link."""
    refuse_link(path)
    path.unlink(missing_ok=True)
