"""The list of scenarios, and what became of each.

A scenario is a function `(chaos, turn)` with the decorator `scenario`, in one of the modules that
`__main__.py` imports. It does one kind of harm once, and raises if anything is lost by it.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.chaos.runs import Chaos

Harm = Callable[[Chaos, int], "Sequence[Scenario] | None"]


class NotHere(Exception):  # noqa: N818
    """A scenario cannot be tried on this machine, for the reason in the message."""


@dataclass
class Scenario:
    """A kind of harm, and what became of each time that it was tried.

    A harm of many kinds returns them as `parts`, each with its own line in the table.

    Attributes:
        name: for the table.
        harm: does it once.
        times: how often it is tried, at most.
        quick: whether it is part of the short tier in CI.
        long: whether it is tried in a process of its own, beside the others.
    """

    name: str
    harm: Harm
    times: int
    quick: bool
    long: bool = False
    tried: int = 0
    seconds: float = 0.0
    losses: list[str] = field(default_factory=list)
    skipped: str = ""
    parts: Sequence["Scenario"] = ()

    def attempt(self, chaos: Chaos) -> None:
        """Tries it once, and keeps what it raised."""
        began, turn = time.monotonic(), self.tried
        try:
            self.parts = self.harm(chaos, turn) or ()
        except NotHere as reason:
            self.skipped = str(reason)
        except Exception:
            self.losses.append(f"turn {turn}:\n{traceback.format_exc()}")
        self.losses += [loss for part in self.parts for loss in part.losses]
        self.tried += not self.skipped
        self.seconds += time.monotonic() - began

    @property
    def is_due(self) -> bool:
        """Whether it is to be tried again."""
        return self.tried < self.times and not self.skipped


SCENARIOS: list[Scenario] = []


def scenario(
    name: str, *, times: int = 1, quick: bool = False, long: bool = False
) -> Callable[[Harm], Harm]:
    """Adds a function to the list of scenarios; the arguments are those of `Scenario`."""

    def add(harm: Harm) -> Harm:
        SCENARIOS.append(Scenario(name, harm, times, quick, long))
        return harm

    return add


def table(scenarios: Sequence[Scenario]) -> list[str]:
    """Returns the results as lines of a Markdown table."""
    rows = [["fault", "tried", "survived", "lost", "seconds"]]
    for each in (row for scenario in scenarios for row in scenario.parts or [scenario]):
        lost = len(each.losses)
        survived = each.skipped or str(each.tried - lost)
        rows.append([each.name, str(each.tried), survived, str(lost), f"{each.seconds:.0f}"])
    rows.insert(1, ["---"] * len(rows[0]))
    return [f"| {' | '.join(row)} |" for row in rows]
