"""Ranks and data workers that die or stop: the user reads the cause, and no process stays behind.

The ranks are started by the app, as with `engine.nproc_per_node=2`.
"""

import os
import signal
import time
from pathlib import Path

from tests.chaos.jobs import Job, wait_until
from tests.chaos.runs import Chaos, assert_sentence
from tests.chaos.scenarios import scenario
from tests.resume.checks import newest

TIMEOUT = 20  # seconds that a rank waits for another
MARGIN = 30  # seconds for everything else, on a busy machine
ENDLESS = ("trainer.steps=1000000", "trainer.valid_every=0")


def in_session(session: int) -> dict[int, tuple[int, str]]:
    """Returns the parent and the command line of all processes of a session that still run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, number = (
                (path / "stat").read_text().rpartition(")")[2].split(maxsplit=4)[:4]
            )
            if int(number) == session and state != "Z":
                words = (path / "cmdline").read_text().replace("\0", " ")
                found[int(path.name)] = (int(parent), words)
        except OSError:
            continue  # it has ended meanwhile
    return found


def ranks_of(job: Job) -> list[int]:
    """Returns the process ids of the ranks that a command has started, in order."""
    processes = in_session(job.pids[0]).items()
    return sorted(pid for pid, (_, words) in processes if "spawn_main" in words)


def under_way(folder: Path) -> bool:
    """Whether a run has logged some steps."""
    path = folder / "run/metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) > 5


def two_ranks(chaos: Chaos, folder: Path) -> Job:
    """Starts a run of two ranks, and waits until it has made some steps."""
    words = (*ENDLESS, "engine.nproc_per_node=2", f"engine.timeout={TIMEOUT}")
    job = chaos.start(folder, "llm", "ddp", *words)
    wait_until(lambda: under_way(folder) or not job.running(), "some steps")
    return job


def assert_ends(job: Job, *parts: str) -> None:
    """Asserts that a run ends in time, with one sentence, and that all its processes are gone."""
    began = time.monotonic()
    (status,) = job.wait()
    seconds = time.monotonic() - began
    assert status == 1, (status, job.stderr)
    assert seconds < TIMEOUT + MARGIN, f"it ended after {seconds:.0f} s"
    assert_sentence(job.stderr, *parts)
    wait_until(lambda: not in_session(job.pids[0]), "all processes to end", MARGIN)


def signal_a_rank(chaos: Chaos, folder: Path, rank: int, number: signal.Signals) -> Job:
    """Sends a signal to one of two ranks of a run that has made some steps."""
    job = two_ranks(chaos, folder)
    os.kill(ranks_of(job)[rank], number)
    return job


@scenario("a rank killed", times=2)
def rank_killed(chaos: Chaos, turn: int) -> None:
    folder, rank = chaos.new_folder(), turn % 2
    job = signal_a_rank(chaos, folder, rank, signal.SIGKILL)
    assert_ends(job, f"rank {rank} was ended by SIGKILL", "repeat the command")
    assert newest(folder / "run") >= 0


@scenario("a rank stopped for ever", times=2)
def rank_stopped(chaos: Chaos, turn: int) -> None:
    rank = turn % 2
    job = signal_a_rank(chaos, chaos.new_folder(), rank, signal.SIGSTOP)
    assert_ends(job, f"rank {1 - rank} timed out after waiting {TIMEOUT} s", "engine.timeout")


@scenario("a data worker killed", times=3, quick=True)
def worker_killed(chaos: Chaos, turn: int) -> None:
    folder = chaos.new_folder()
    job = chaos.start(folder, "llm", "ddp", *ENDLESS, "data.workers=2")
    wait_until(lambda: under_way(folder) or not job.running(), "some steps")
    workers = [p for p, (parent, _) in in_session(job.pids[0]).items() if parent == job.pids[0]]
    os.kill(chaos.draw.choice(workers), signal.SIGKILL)
    assert_ends(job, "a data worker", "data.workers")
