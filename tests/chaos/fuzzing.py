"""Damaged files for every reader: a result, or one sentence."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.jobs import Job
from tests.chaos.runs import Chaos
from tests.chaos.scenarios import Scenario, scenario


@scenario("fuzz", quick=True, long=True)
def fuzz(chaos: Chaos, turn: int) -> Sequence[Scenario]:
    """Each reader has the same time; inputs that crash it are kept in `crashes`."""
    folder = chaos.new_folder()
    run = Path(shutil.copytree(chaos.run_of("llm"), folder / "original"))
    for app, words in (("average", ["num=2"]), ("export", ["format=jit", "latency=false"])):
        job = Job([f"run_dir={run}", *words], folder, instead={0: (f"cosyexp.{app}",)})
        job.finish()
    from tests.fuzz.harness import fuzz, lines
    from tests.fuzz.readers import readers

    rows = []
    for reader in readers(run, folder):
        if not any(part in f"fuzz: {reader.name}".lower() for part in chaos.only):
            continue
        began = time.monotonic()
        found = fuzz(reader, chaos.fuzz_seconds, chaos.seed, chaos.folder / "crashes")
        losses = lines(reader, found)
        row = Scenario(f"fuzz: {reader.name}", fuzz_row, 1, False, tried=found.inputs)
        row.losses, row.seconds = losses, time.monotonic() - began
        rows.append(row)
    return rows


def fuzz_row(chaos: Chaos, turn: int) -> None:
    """A row of the table, which is not tried by itself."""
    raise AssertionError
