"""Runs apps in forks of this process, which has imported the heavy packages, one fork per rank.

As under torchrun, the ranks find each other by their environment. `Job` does not wait for them, so
that a scenario can harm them while they run.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tests.apps.warm import HEAVY, end_now, run
from tests.support import free_ports

PATIENCE = 240.0  # seconds that anything may take on a busy machine


def import_heavy() -> None:
    """Imports what every job needs, once, before the first fork."""
    for name in (*HEAVY, "soundfile", "cosyexp.data.inspection"):
        importlib.import_module(name)
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would not survive a fork
    warnings.simplefilter("ignore")  # in the forks, that a module runs which was imported before


def fork(work: Callable[[], object]) -> int:
    """Runs a function in a child process in a session of its own, and returns its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        work()
        end_now(0)
    except BaseException:
        traceback.print_exc()
    end_now(1)


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Waits until a condition holds; fails if that takes too long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.005)


class Job:
    """A command that runs in one fork per rank; its output is in files.

    Args:
        words: of the command.
        folder: where it runs.
        ranks: number of forks.
        instead: of some ranks, the module that runs instead of the app, and its first words.
        env: more variables of the environment.
        output: folder for what it prints; None: where it runs.
        seconds: after which it ends by itself.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        ranks: int = 1,
        instead: Mapping[int, Sequence[object]] | None = None,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        seconds: float = 2 * PATIENCE,
    ) -> None:
        output = output or folder
        self.out, self.err = output / "stdout.txt", output / "stderr.txt"
        for path in (self.out, self.err):
            path.unlink(missing_ok=True)
            path.touch(0o666)
        (port,) = free_ports(1)
        self.statuses: dict[int, int] = {}
        self.pids = []
        for rank in range(ranks):
            module, *first = map(str, (instead or {}).get(rank, ("cosyexp.train",)))
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            order = {
                "module": module,
                "words": [*first, *words],
                "cwd": str(folder),
                "seconds": int(seconds),
                "out": str(self.out),
                "err": str(self.err),
                "env": {
                    "COLUMNS": "200",
                    **(env or {}),
                    **({k: str(v) for k, v in (variables | address).items()} if ranks > 1 else {}),
                },
            }
            self.pids.append(fork(partial(run, order)))

    def running(self) -> list[int]:
        """Returns the process ids of the ranks that have not ended."""
        for pid in self.pids:
            if pid not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.statuses]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every rank that runs."""
        for pid in self.running():
            os.kill(pid, number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Waits for all ranks and returns their exit statuses."""
        try:
            wait_until(lambda: not self.running(), "the ranks to end", seconds)
        finally:
            self.signal(signal.SIGKILL)
            while self.running():
                time.sleep(0.005)
        return [self.statuses[pid] for pid in self.pids]

    def wait_for_first(self) -> None:
        """Waits until the first rank has ended."""
        wait_until(lambda: self.pids[0] not in self.running(), "the first rank to end")

    def kill(self) -> list[int]:
        """Kills all ranks, as a power cut does, and returns their exit statuses."""
        self.signal(signal.SIGKILL)
        return self.wait()

    @property
    def stdout(self) -> str:
        """What all ranks have printed."""
        return self.out.read_text() if self.out.exists() else ""

    @property
    def stderr(self) -> str:
        """What all ranks have printed to stderr."""
        return self.err.read_text() if self.err.exists() else ""

    def finish(self) -> str:
        """Waits for a job that must succeed, and returns what it printed."""
        statuses = self.wait()
        assert not any(statuses), f"exit statuses {statuses}\n{self.stdout}{self.stderr}"
        return self.stdout

    def result(self) -> subprocess.CompletedProcess[str]:
        """Waits for the job; returns the result of the first rank that failed."""
        statuses = self.wait()
        status = next((status for status in statuses if status), 0)
        return subprocess.CompletedProcess([], status, self.stdout, self.stderr)
