"""2,000 steps of each model: neither memory nor the number of open files grows."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

from tests.chaos.jobs import wait_until
from tests.chaos.runs import Chaos
from tests.chaos.scenarios import scenario
from tests.support import MODELS

STEPS, WARM = 2000, 600
WORDS = (
    f"trainer.steps={STEPS}",
    "trainer.log_every=20",
    "trainer.valid_every=200",
    "checkpoint.every=200",
)
GROWTH = 1.02
LIMIT = 900  # seconds


def last_step(run: Path) -> int:
    """Returns the step of the last whole line of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


@scenario("2,000 steps: growth of memory or open files", times=3, long=True)
def grows(chaos: Chaos, turn: int) -> None:
    """The last 400 steps are compared with steps 600 to 1000."""
    folder = chaos.new_folder()
    job = chaos.start(folder, MODELS[turn % 3], "ddp", *WORDS, seconds=LIMIT)
    process = Path(f"/proc/{job.pids[0]}")
    early: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []

    def measured() -> bool:
        if not job.running():
            return True
        step = last_step(folder / "run")
        pages = int((process / "statm").read_text().split()[1])
        now = (pages * os.sysconf("SC_PAGESIZE"), len(os.listdir(process / "fd")))
        if WARM <= step <= 1000:
            early.append(now)
        elif step > STEPS - 400:
            late.append(now)
        return False

    wait_until(measured, "2,000 steps", LIMIT)
    job.finish()
    typical = statistics.median_high  # a checkpoint that is being written is one more open file
    kinds: list[tuple[str, Any]] = [("bytes of memory", max), ("open files", typical)]
    for i, (what, of) in enumerate(kinds):
        before, after = (of([sample[i] for sample in samples]) for samples in (early, late))
        assert 0 < after <= GROWTH * before, f"{what} grew from {before} to {after}"
