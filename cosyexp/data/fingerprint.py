"""Fingerprints of shards: a hash of the whole content, which is read again only if a file changed.

The hash is kept in the folder of the shard's fields, together with the size and the times of the
file that it was computed from. It does not depend on where the file lies, or when it was copied.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from cosyexp.errors import UserError
from cosyexp.run.documents import DamagedFileError, open_regular, read_text
from cosyexp.run.files import below, write_text

STAMP = "fingerprint.txt"


def fingerprint(shard: Path) -> bytes:
    """Returns a hash of the content of a shard.

    Raises:
        UserError: if the shard does not exist.
    """
    return _hash(shard, _stamp(shard))


def fingerprints(shards: Sequence[Path], processes: int) -> list[bytes]:
    """Returns the fingerprints of shards, of which `processes` are read at a time."""
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(fingerprint, shards))


def keep_fingerprint(shard: Path) -> None:
    """Writes the fingerprint next to the fields of a shard, so that the next start reads it."""
    stamp = _stamp(shard)
    digest = _hash(shard, stamp)
    if _kept(shard, stamp) != digest:
        _keep(shard, stamp, digest)


def _path(shard: Path) -> Path:
    return below(shard.parent, f"{shard.stem}.fields", STAMP)


def _stamp(shard: Path) -> str:
    """Returns what changes with a file: its size and times."""
    try:
        status = os.stat(shard)
    except FileNotFoundError:
        raise UserError(f"there is no data file {shard}: prepare it, or correct its list") from None
    # the change time is new even if the modification time is copied
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _kept(shard: Path, stamp: str) -> bytes | None:
    """Returns the hash that was kept for a file of this size and these times, if there is one."""
    with suppress(OSError, ValueError, DamagedFileError):
        known, digest = read_text(_path(shard)).split()
        if known == stamp:
            return digest.encode()
    return None


def _keep(shard: Path, stamp: str, digest: bytes) -> None:
    with suppress(OSError):  # data that cannot be written to are read at each start
        write_text(_path(shard), f"{stamp} {digest.decode()}\n")


@cache
def _hash(shard: Path, stamp: str) -> bytes:
    if kept := _kept(shard, stamp):
        return kept
    with open_regular(shard) as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if _path(shard).parent.is_dir():  # otherwise it is kept once the shard has fields
        _keep(shard, stamp, digest.encode())
    return digest.encode()
