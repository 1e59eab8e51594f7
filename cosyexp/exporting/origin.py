"""Which exported files may be run: those that an export of this user wrote.

ONNX, TorchScript and pt2 files are programs. To load one is to run it, and no check can tell what
it will do. A hash next to a file shows that the file is whole, not who wrote it: whoever hands over
a folder writes both. So `export` adds the hash of each file to a record in the user's state folder,
`$XDG_STATE_HOME/cosyexp/exports` or `~/.local/state/cosyexp/exports`, and a file that is not in it
runs only with `trusted_exports=true`.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.documents import open_regular
from cosyexp.run.files import append, make_folder

log = logging.getLogger(__name__)


def hashes(path: Path) -> dict[str, str]:
    """Returns the hashes of an exported file, and of the file of its weights if that is separate.

    The ONNX exporter writes weights of more than 2 GB to `<file>.data`.
    """
    return {file.name: file_hash(file) for file in exported_files(path)}


def exported_files(path: Path) -> list[Path]:
    """Returns an exported file, and the file of its weights if that is separate."""
    weights = path.with_name(f"{path.name}.data")
    return [path, weights] if weights.exists() else [path]


def check_origin(path: Path, written: Mapping[str, str], trusted: bool) -> None:
    """Checks that an exported file is whole, and that it may be run; it is not opened otherwise.

    Args:
        path: the file.
        written: the hashes in the report next to it, by file name; empty if there are none.
        trusted: run it whoever wrote it.

    Raises:
        UserError: the file has changed, or an export of another user, or of none, wrote it.
    """
    found = hashes(path)
    if not trusted and set(found.values()) <= known():
        return
    if written and found != written:
        raise UserError(f"{path} has changed since it was exported: export it again")
    if not trusted:
        raise UserError(
            f"{path} is a program that no export of yours wrote: export it again, or add "
            f"trusted_exports=true if you trust whoever made it"
        )


def remember(written: Iterable[str]) -> None:
    """Adds hashes to the record of the files that this user exported.

    If the record cannot be written, as in a container without a home, a warning says so.
    """
    try:
        make_folder(record().parent, mode=0o700)
        with append(record(), mode=0o600) as file:
            # in one write, which other exports do not interrupt; the first line ends a torn one
            file.write("".join(f"\n{value}" for value in sorted(written)))
    except (OSError, RuntimeError, UserError) as error:
        log.warning(
            "the export cannot be recorded as yours (%s): to run it, add trusted_exports=true",
            error,
        )


def known() -> set[str]:
    """Returns the hashes of the files that this user exported.

    Raises:
        UserError: others could have written the record.
    """
    try:
        path = record()
        if path.is_symlink():
            return set()
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise UserError(f"{path} can be written by others: remove it, and export again")
            return set(file.read().decode().split())
    except (OSError, RuntimeError, UnicodeDecodeError):
        return set()


def record() -> Path:
    """Returns the path of the record.

    Raises:
        RuntimeError: this user has no home.
    """
    root = os.environ.get("XDG_STATE_HOME", "")
    base = Path(root) if root.startswith("/") else Path.home() / ".local/state"
    return base / "cosyexp" / "exports"
