"""Trains, and kills itself with SIGKILL at a chosen point of the code.

Usage: `python -m tests.resume.killer <point> <n> <overrides of cosyexp.train>`.

It dies when it reaches the point for the n-th time:

    step      before a step
    update    before an update; of a GAN, with an even n, only the discriminator is updated
    weights   with half of a file of weights written
    meta      with all files of a checkpoint written, but not its meta.yaml
    rename    with a checkpoint written, but not renamed
    fsync     before a file or a folder is synced, of a file with only half of it written
    replace   before a file or a folder replaces another
    metrics   with half of a line of metrics.jsonl written
    start     before the n-th of some stages of the start

`fsync/<name>` and `replace/<name>` only count files whose name contains <name>.
"""

import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cosyexp.training.build
import cosyexp.training.saving
from cosyexp.run.checkpoint import Checkpoints
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import save_tensors
from cosyexp.train import main
from cosyexp.training.engines.common import BaseEngine
from cosyexp.training.loggers.jsonl import JsonLines
from cosyexp.training.trainer import Trainer


def nothing(*_: Any, **__: Any) -> None:
    pass


def always(*_: Any, **__: Any) -> bool:
    return True


def die_before(
    owner: Any,
    name: str,
    times: int,
    last_act: Callable[..., object] = nothing,
    counts: Callable[..., bool] = always,
) -> None:
    """Patches a function to kill this process when it is called.

    Args:
        owner: a class or a module.
        name: of its function.
        times: how many calls it takes.
        last_act: called first, with the arguments of the call.
        counts: whether a call with these arguments counts.
    """
    function, calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += counts(*args, **kwargs)
        if calls == times:
            last_act(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, patched)


def save_half(path: Path, tensors: Any, metadata: Any = None) -> None:
    save_tensors(path, tensors, metadata)
    os.truncate(path, path.stat().st_size // 2)


def is_checkpoint(source: object, _: object) -> bool:
    return str(source).endswith(".tmp")


def cut_to_half(handle: int) -> None:
    if stat.S_ISREG((state := os.fstat(handle)).st_mode):
        os.truncate(f"/proc/self/fd/{handle}", state.st_size // 2)  # also if it is open to read


def log_half(logger: JsonLines, step: int, epoch: int, values: Any) -> None:
    line = json.dumps({"step": step, "epoch": epoch, **values})
    logger._file.write(line[: len(line) // 2])
    logger.flush()


def die_at_fsync(times: int, name: str = "") -> None:
    def counts(handle: int) -> bool:
        return name in Path(os.readlink(f"/proc/self/fd/{handle}")).name

    die_before(os, "fsync", times, cut_to_half, counts)


def die_at_replace(times: int, name: str = "") -> None:
    def counts(_: object, target: object, **__: object) -> bool:
        return name in Path(str(target)).name

    die_before(os, "replace", times, counts=counts)


STAGES: list[tuple[Any, str]] = [
    (RunDirectory, "lock"),
    (cosyexp.training.build, "build_objective"),
    (cosyexp.training.build, "build_datasets"),
    (Trainer, "setup"),
    (RunDirectory, "write_config"),
    (JsonLines, "start"),
]
POINTS: dict[str, Callable[..., None]] = {
    "step": lambda n: die_before(Trainer, "step", n),
    "update": lambda n: die_before(BaseEngine, "step", n),
    "weights": lambda n: die_before(cosyexp.training.saving, "save_tensors", n, save_half),
    "meta": lambda n: die_before(Checkpoints, "commit", n),
    "rename": lambda n: die_before(os, "replace", n, counts=is_checkpoint),
    "fsync": die_at_fsync,
    "replace": die_at_replace,
    "metrics": lambda n: die_before(JsonLines, "log_metrics", n, log_half),
    "start": lambda n: die_before(STAGES[n - 1][0], STAGES[n - 1][1], 1),
}

if __name__ == "__main__":
    (point, *name), times = sys.argv[1].split("/"), int(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    POINTS[point](times, *name)
    main()
