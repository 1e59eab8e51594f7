"""`python -m tests.resume.stopper validation|step <words of cosyexp.train>`: trains, and gets SIGTERM in a validation, or after a step."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from cosyexp.data.loader import MicroBatch, ValidationLoader
from cosyexp.train import main
from cosyexp.training.trainer import Trainer


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def within_a_validation() -> None:
    batches = ValidationLoader.__iter__

    def stopping(self: ValidationLoader) -> Iterator[MicroBatch]:
        for i, micro in enumerate(batches(self)):
            if i == 1:
                stop()
            yield micro

    ValidationLoader.__iter__ = stopping  # type: ignore[method-assign]


def after_two_steps() -> None:
    step, seen = Trainer.step, []

    def stopping(self: Trainer, micro_batches: Any) -> None:
        step(self, micro_batches)
        seen.append(1)
        if len(seen) == 2:
            stop()

    Trainer.step = stopping  # type: ignore[method-assign]


if __name__ == "__main__":
    {"validation": within_a_validation, "step": after_two_steps}[sys.argv.pop(1)]()
    main()
