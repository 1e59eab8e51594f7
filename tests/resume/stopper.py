"""Trains, and gets SIGTERM within a validation or after its second step.

Usage: `python -m tests.resume.stopper validation|step <overrides of cosyexp.train>`.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

from cosyexp.data.loader import MicroBatch, ValidationLoader
from cosyexp.train import main
from cosyexp.training.trainer import Trainer


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_within_validation() -> None:
    batches = ValidationLoader.__iter__

    def patched(self: ValidationLoader) -> Iterator[MicroBatch]:
        for i, micro in enumerate(batches(self)):
            if i == 1:
                stop()
            yield micro

    ValidationLoader.__iter__ = patched  # type: ignore[method-assign]


def stop_after_two_steps() -> None:
    step, steps = Trainer.step, 0

    def patched(self: Trainer, micro_batches: Sequence[MicroBatch]) -> Mapping[str, float]:
        nonlocal steps
        units = step(self, micro_batches)
        steps += 1
        if steps == 2:
            stop()
        return units

    Trainer.step = patched  # type: ignore[method-assign]


if __name__ == "__main__":
    {"validation": stop_within_validation, "step": stop_after_two_steps}[sys.argv.pop(1)]()
    main()
