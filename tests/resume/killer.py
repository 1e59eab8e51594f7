"""`python -m tests.resume.killer <point> <n> <words of cosyexp.train>`: trains, and dies by SIGKILL at a point of its own code.

Points: the n-th time that it begins a step, is half way through a step (one trainable has moved), writes half of a file of weights,
has written the files of a checkpoint but not its meta, or has written it all but not renamed it.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cosyexp.training.saving
from cosyexp.run.checkpoint import Checkpoints
from cosyexp.run.tensors import save_tensors
from cosyexp.train import main
from cosyexp.training.engines.common import BaseEngine
from cosyexp.training.trainer import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def anything(*_: Any, **__: Any) -> bool:
    return True


def before(
    owner: Any,
    name: str,
    times: int,
    last_words: Callable[..., object] = anything,
    counts: Callable[..., bool] = anything,
) -> None:
    """Dies when `owner.name` is called for the n-th time with arguments that count."""
    function, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if counts(*args, **kwargs):
            calls.append(1)
        if len(calls) == times:
            last_words(*args, **kwargs)
            die()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def half_a_file(path: Path, tensors: Any) -> None:
    save_tensors(path, tensors)
    os.truncate(path, path.stat().st_size // 2)


POINTS: dict[str, Callable[[int], None]] = {
    "step": lambda n: before(Trainer, "step", n),
    "update": lambda n: before(BaseEngine, "step", n),
    "weights": lambda n: before(cosyexp.training.saving, "save_tensors", n, half_a_file),
    "meta": lambda n: before(Checkpoints, "commit", n),
    "rename": lambda n: before(
        os, "replace", n, counts=lambda source, _: str(source).endswith(".tmp")
    ),
}

if __name__ == "__main__":
    point, times = sys.argv[1], int(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    POINTS[point](times)
    main()
