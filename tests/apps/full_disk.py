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
import cosyexp.run.tensors


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


def full_from(module: Any, times: int) -> None:
    written = []

    def opened(path: Any, mode: str = "r") -> Any:
        file = open(path, mode)  # noqa: SIM115
        written.extend([path] if "w" in mode else [])
        return FullFile(file) if "w" in mode and len(written) == times else file

    module.open = opened


def full_state(times: int) -> None:
    write, written = Path.write_bytes, []

    def write_bytes(path: Path, content: Any) -> int:
        written.append(path)
        if len(written) < times:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise no_space()

    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    where, times, app, *words = sys.argv[1:]
    {
        "tensors": lambda n: full_from(cosyexp.run.tensors, n),
        "files": lambda n: full_from(cosyexp.run.files, n),
        "state": full_state,
    }[where](int(times))
    sys.argv[1:] = words
    importlib.import_module(f"cosyexp.{app}").main()
