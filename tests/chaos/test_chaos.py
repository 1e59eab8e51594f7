"""The short tier of `make chaos`: scenarios that no other test tries, and readers for a moment.

They run in one process, whose forks need no imports.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.runs import Chaos
from tests.chaos.scenarios import NotHere, Scenario, table
from tests.support import ROOT, environment

SHORT = (
    "a folder that cannot be written",
    "two trainings in one directory",
    "a loss that is not finite on one rank of two: stop",
    "a data worker killed",
    "fuzz: ",  # every reader, for a moment
)


def chaos(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m tests.chaos`."""
    command = [sys.executable, "-m", "tests.chaos", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def result() -> subprocess.CompletedProcess[str]:
    """The output of the short tier."""
    return chaos("--quick", "--fuzz-seconds=0.3", f"--only={','.join(SHORT)}")


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost(name, result):
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    own = [row for row in rows if row[0].startswith(f"| {name}")]
    assert own, result.stdout + result.stderr
    for row in own:
        assert row[3] == "0" and (int(row[1]) > 0 or not row[2].isdigit()), result.stdout


def test_what_is_lost_is_counted_and_what_cannot_be_tried_is_named():
    def breaks(_: object, turn: int) -> None:
        assert turn != 1, "a loss"

    def cannot(_: object, turn: int) -> None:
        raise NotHere("no disk")

    lossy, skipped = Scenario("lossy", breaks, 3, False), Scenario("other", cannot, 3, False)
    for each in (lossy, skipped):
        while each.is_due:
            each.attempt(Chaos(Path(), Path()))
    assert len(lossy.losses) == 1 and "a loss" in lossy.losses[0]
    rows = ["| lossy | 3 | 2 | 1 | 0 |", "| other | 0 | no disk | 0 | 0 |"]
    assert table([lossy, skipped])[2:] == rows


def test_an_unknown_name_is_refused():
    result = chaos("--only=meteorite")
    assert result.returncode == 1 and "--only=meteorite is no part of" in result.stderr
