"""`python -m tests.apps.full_disk <where> <n> <app> <words>`: runs an app on a disk that gets full.

where: the kind of files of which the n-th does not fit: tensors (weights), state (of the trainer),
or files (configs, metadata, shards, audio).
"""

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import cosyexp.run.files


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """Writes half of what it is given, as a disk does that becomes full."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, content: Any) -> int:
        self.file.write(memoryview(content)[: len(content) // 2])
        raise no_space()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def kind(name: str) -> str:
    """Returns which kind of files a file is of."""
    if ".safetensors" in name:
        return "tensors"
    return "state" if name.startswith("rank_") else "files"


def full_at(where: str, times: int) -> None:
    """Makes the disk full at the n-th file of a kind; all files are written by one module."""
    written = []

    def opened(handle: Any, mode: str, **options: Any) -> Any:
        file = open(handle, mode, **options)  # noqa: SIM115
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        written.extend([path] if mode == "wb" and kind(path.name) == where else [])
        return FullFile(file) if written[times - 1 :] == [path] else file

    cosyexp.run.files.open = opened  # type: ignore[attr-defined]


if __name__ == "__main__":
    where, times, app, *words = sys.argv[1:]
    full_at(where, int(times))
    sys.argv[1:] = words
    importlib.import_module(f"cosyexp.{app}").main()
