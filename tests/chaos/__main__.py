"""Harms runs in many ways, and prints what was lost; the exit status is 1 if anything was.

    python -m tests.chaos [--minutes 22] [--seed 0] [--only kill,disk] [--quick] [--write]

Each scenario is tried in turn, until all were tried as often as they should be, or time is up; the
long ones are tried in a second process, beside the others.
`--write` puts the table into docs/reliability.md. Files of what was lost stay in the folder that is
printed last.
"""

import argparse
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from tests.chaos import damage, disks, fuzzing, growth, interruptions, kills, nonfinite, processes
from tests.chaos.jobs import fork
from tests.chaos.runs import Chaos, prepared
from tests.chaos.scenarios import SCENARIOS, Scenario, table
from tests.support import ROOT

MODULES = (kills, damage, disks, processes, interruptions, nonfinite, growth, fuzzing)
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- begin of the table of make chaos -->", "<!-- end of the table of make chaos -->"


def arguments() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=22, help="no try begins later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="the short tier, each once")
    parser.add_argument("--fuzz-seconds", type=float, default=5, help="for each kind of file")
    parser.add_argument("--write", action="store_true", help=f"the table into {PAGE.name}")
    return parser.parse_args()


def chosen(only: Sequence[str], quick: bool) -> list[Scenario]:
    """Returns the scenarios to try."""
    names = {s.name.lower(): s for s in SCENARIOS}
    # "fuzz: wav" is a part of the scenario "fuzz"
    found = [s for name, s in names.items() if any(p in name or name in p for p in only)]
    if quick:
        found = [s for s in found if s.quick]
        for each in found:
            each.times = 1
    if not found:
        sys.exit(f"--only={','.join(only)} is no part of {', '.join(names)}")
    return found


def attempt_all(scenarios: Sequence[Scenario], chaos: Chaos, until: float) -> None:
    """Tries the scenarios in turn, until none is due or the time is up."""
    while due := [each for each in scenarios if each.is_due]:
        for each in due:
            if time.monotonic() > until:
                return
            each.attempt(chaos)
            print(".!"[bool(each.losses)], end="", flush=True)


def write(lines: Sequence[str], minutes: float) -> None:
    """Replaces the table in docs/reliability.md, which says how long making it took."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"Made on {date.today()} at commit {commit or 'unknown'}, in {minutes:.0f} minutes."
    PAGE.write_text("\n".join([f"{before}{BEGIN}", made, "", *lines, f"{END}{after}"]))


def main() -> int:
    """Tries the scenarios, and returns the exit status."""
    options = arguments()
    only = [part.strip().lower() for part in options.only.split(",")]
    scenarios = chosen(only, options.quick)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    began, data = time.monotonic(), prepared(folder / "data")
    until = began + 60 * options.minutes
    short = [each for each in scenarios if not each.long]
    long = [each for each in scenarios if each.long]

    def start(name: str) -> Chaos:
        """Returns what the scenarios of one process need."""
        (own := folder / name).mkdir()
        return Chaos(own, data, options.seed, options.fuzz_seconds, only)

    def try_long() -> None:
        attempt_all(long, start("long"), until)
        (folder / "tried").write_bytes(pickle.dumps(long))

    beside = fork(try_long)
    try:
        attempt_all(short, start("short"), until)
        _, status = os.waitpid(beside, 0)
    except BaseException:
        os.kill(beside, signal.SIGKILL)
        raise
    assert status == 0, "the process of the long scenarios failed"
    scenarios = [*short, *pickle.loads((folder / "tried").read_bytes())]
    losses = [f"{each.name}, {loss}" for each in scenarios for loss in each.losses]
    print("", *losses, *table(scenarios), sep="\n")
    if options.write:
        write(table(scenarios), (time.monotonic() - began) / 60)
    if losses:
        print(f"lost with seed {options.seed}; the files are in {folder}")
    else:
        shutil.rmtree(folder)
    untried = [each.name for each in scenarios if not each.tried and not each.skipped]
    if untried:
        print(f"not tried in {options.minutes} minutes: {', '.join(untried)}")
    return int(bool(losses or untried))


if __name__ == "__main__":
    sys.exit(main())
