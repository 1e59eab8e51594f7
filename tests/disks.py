"""Small disks for the tests of full ones."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_DISK = "no file system can be mounted here, so no disk can be filled"


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[bool]:
    """Mounts a new file system; yields False where this process may not do that."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def leave(disk: Path, size: int) -> None:
    """Fills a disk except for some bytes."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(free.f_bavail * free.f_bsize - size, 0)))
