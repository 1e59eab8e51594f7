"""Folders that are complete or not there, locks, and what killed processes leave."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosyexp.run.files import MODE, SAFE, make_folder, refuse_link, sync

PART, OLD = ".tmp", ".old.tmp"


def begin_folder(folder: Path) -> Path:
    """Creates the empty folder `<folder>.tmp`; `commit_folder` turns it into `folder`.

    Raises:
        UserError: there is a symbolic link in its place.
    """
    part = folder.with_name(folder.name + PART)
    for path in (folder, part, folder.with_name(folder.name + OLD)):
        refuse_link(path)
    recover_folder(folder)
    remove_tree(part)
    make_folder(part)
    return part


def commit_folder(part: Path) -> Path:
    """Puts a folder of `begin_folder` in its place, atomically, and returns its path.

    All that the folder holds must be synced to disk. A folder that is there already is removed.
    """
    folder = part.with_name(part.name.removesuffix(PART))
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    sync(folder.parent)
    remove_tree(old)
    return folder


def recover_folder(folder: Path) -> None:
    """Brings a folder back whose replacement was interrupted between the two renames."""
    old = folder.with_name(folder.name + OLD)
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    remove_tree(old)


def remove_partial_folders(parent: Path, pattern: str = "*") -> None:
    """Removes the folders in `parent` that were begun and never committed."""
    for old in parent.glob(pattern + OLD):
        recover_folder(old.with_name(old.name.removesuffix(OLD)))
    for part in parent.glob(pattern + PART):
        remove_tree(part)


def remove_tree(path: Path) -> None:
    """Removes a folder with all that it holds, if there is one; a link to a folder stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def remove_partial_files(folder: Path) -> None:
    """Removes the `*.part` files and folders that killed processes left in a folder."""
    for path in folder.glob("*.part"):
        if path.is_symlink():
            continue
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def staged_files(out: Path, name: str) -> Iterator[Path]:
    """Yields a temporary folder, whose files move into `out` when the block ends.

    If the block raises, `out` is left as it was. Meanwhile `out` is locked, so that the temporary
    folder is not taken for a leftover.

    Args:
        out: the folder, created if it is missing.
        name: of the temporary folder; leftovers of a killed process of this name are removed.

    Raises:
        UserError: a file would replace a symbolic link.
    """
    part = out / f".{name}.part"
    created = [path for path in (out, *out.parents) if not path.exists()]
    try:
        refuse_link(part)
        make_folder(out)
        with locked(out, shared=True):
            remove_tree(part)
            make_folder(part)
            yield part
            files = sorted(part.iterdir())
            for path in files:
                refuse_link(out / path.name)
                sync(path)
            for path in files:
                os.replace(path, out / path.name)
            sync(out)
    finally:
        remove_tree(part)
        with suppress(OSError):  # a new folder that is not empty stays
            for path in created:
                path.rmdir()


@contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Holds a lock on a folder, or on a file, which is created if it is missing.

    Args:
        path: the folder or the file.
        wait: whether to wait for another process that holds the lock.
        shared: whether others may hold a shared lock at the same time.

    Yields:
        Whether it is held: False if another process holds it.
    """
    if path.is_dir():
        handle = os.open(path, os.O_RDONLY)
    else:
        refuse_link(path)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | SAFE, MODE)
    held = True
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:  # some network file systems have no locks
            held = wait
        yield held
    finally:
        os.close(handle)
