"""A SLURM of one node on loopback, without systemd, cgroups and accounting.

It needs root, and Debian's slurm-wlm and munge.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CPUS = 4  # also on a machine with fewer; the jobs of tests are small
CONFIG = """
ClusterName=cosyexp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=test Nodes={host} Default=YES MaxTime=60 GraceTime=30
"""


def missing() -> str | None:
    """Returns why no cluster can be started here, or None."""
    if absent := [
        name for name in (*DAEMONS, "srun") if shutil.which(name, path=search_path()) is None
    ]:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start SLURM's daemons"


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Starts a cluster and yields the environment of its commands; on exit, stops it.

    Args:
        folder: for the files of the cluster.
    """
    host = socket.gethostname().split(".")[0]
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, two)]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, ports=ports, folder=folder, cpus=CPUS)
    )
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    substitutes = Path(__file__).with_name("bin")  # sacct, which needs accounting
    env = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{substitutes}:{search_path()}",
    }
    files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munge.seed",
    }
    try:
        run(
            env,
            "munged",
            "--force",
            *(f"--{option}={folder / name}" for option, name in files.items()),
        )
        run(env, "slurmctld")
        run(env, "slurmd", "-N", host)
        until(
            lambda: "idle" in run(env, "sinfo", "--noheader", "--format=%T", check=False),
            "the node is idle",
            30,
        )
        yield env
    finally:
        run(env, "scancel", "--user=root", check=False)
        until(
            lambda: not run(env, "squeue", "--noheader", check=False).strip(),
            "the queue is empty",
            30,
        )
        for name in reversed(DAEMONS):
            stop(name, folder / f"{name}.pid")


def run(env: dict[str, str], *words: str, check: bool = True) -> str:
    result = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def until(true: Callable[[], bool], what: str, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"waited {seconds} s until {what}"
        time.sleep(0.1)


def stop(name: str, pid_file: Path) -> None:
    """Ends a daemon by the process id in a file, if that process still is this daemon."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    comm = Path(f"/proc/{pid}/comm")
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            if not comm.exists() or comm.read_text().strip() != name:
                return
            os.kill(pid, number)
            time.sleep(0.1)
