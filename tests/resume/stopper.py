"""Trains, and gets a signal at a chosen point of the code, once.

Usage: `python -m tests.resume.stopper <point>[/<signal>] <overrides of cosyexp.train>`.

    validation    within a validation
    step          after the second step
    save          before the second checkpoint is renamed
    start<n>      before the n-th of some stages of the start, see killer.py

The signal is SIGTERM unless another is named.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cosyexp.data.loader import MicroBatch, ValidationLoader
from cosyexp.run.checkpoint import Checkpoints
from cosyexp.train import main
from cosyexp.training.trainer import Trainer
from tests.resume.killer import STAGES

Stop = Callable[[], None]


def stop_within_validation(stop: Stop) -> None:
    batches = ValidationLoader.__iter__

    def patched(self: ValidationLoader) -> Iterator[MicroBatch]:
        for i, micro in enumerate(batches(self)):
            if i == 1:
                stop()
            yield micro

    ValidationLoader.__iter__ = patched  # type: ignore[method-assign]


def stop_in(owner: Any, name: str, times: int, stop: Stop, after: bool = False) -> None:
    """Patches a function to stop this process before or after its n-th call."""
    function, calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times and not after:
            stop()
        result = function(*args, **kwargs)
        if calls == times and after:
            stop()
        return result

    setattr(owner, name, patched)


POINTS: dict[str, Callable[[Stop], None]] = {
    "validation": stop_within_validation,
    "step": lambda stop: stop_in(Trainer, "step", 2, stop, after=True),
    "save": lambda stop: stop_in(Checkpoints, "commit", 2, stop),
    **{f"start{n}": partial(stop_in, owner, name, 1) for n, (owner, name) in enumerate(STAGES, 1)},
}

if __name__ == "__main__":
    point, _, name = sys.argv.pop(1).partition("/")
    number = signal.Signals[name or "SIGTERM"]
    POINTS[point](lambda: os.kill(os.getpid(), number))
    main()
