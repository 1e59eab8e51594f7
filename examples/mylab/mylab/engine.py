"""An engine that counts what it does."""

from typing import Any

from cosyexp.training.engines.base import StepReport
from cosyexp.training.engines.ddp import DDP


class CountingDDP(DDP):
    """DDP that logs the number of its updates when it is closed.

    Args:
        options: those of every engine.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.count = 0

    def step(self, name: str, update: int) -> StepReport:
        """Updates a trainable."""
        self.count += 1
        return super().step(name, update)

    def close(self) -> None:
        """Prints the count."""
        print(f"mylab: {self.count} updates on rank {self.rank}")
        super().close()
