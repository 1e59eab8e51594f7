"""`python -m tests.chaos.nan <first> <last> <overrides>`: trains, with losses that are not finite.

They are those of this rank from one update to another, counted from 1.
"""

import math
import sys
from itertools import count
from typing import Any
from unittest.mock import patch

from torch import Tensor

from cosyexp.train import main
from cosyexp.training.trainer import Trainer

if __name__ == "__main__":
    first, last = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    step, steps = Trainer.step, count(1)

    def patched(trainer: Trainer, micro_batches: Any) -> Any:
        if not first <= next(steps) <= last:
            return step(trainer, micro_batches)
        backward = trainer.engine.backward

        def backward_of_nan(name: str, loss: Tensor, last: bool) -> None:
            backward(name, loss * math.nan, last=last)

        with patch.object(trainer.engine, "backward", backward_of_nan):
            return step(trainer, micro_batches)

    setattr(Trainer, "step", patched)  # noqa: B010, or mypy compares the types
    main()
