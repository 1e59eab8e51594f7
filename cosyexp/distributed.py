"""Distributed setup: ranks from the environment, the process group, and its timeouts.

torchrun and deepspeed set torch's own variables; srun and submitit set theirs, which
`rank_environment` translates. Nothing else reads a launcher's variables. torch is imported by the
functions that need it, as the command line reads the environment too.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cosyexp.errors import PeerRankError, UserError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

FIRST_PORT, PORTS = 12000, 20000  # below the range that Linux gives to outgoing connections
NCCL_MARGIN = 60.0  # seconds that NCCL waits longer than Gloo
PEER_GRACE = (
    2.0  # seconds that a rank delays the report of a lost peer, whose own error explains more
)
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
CONNECTION_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|communicator was aborted",
    re.IGNORECASE,
)

# variables of a task launcher: number of tasks, rank, local rank, job id, node list
SRUN = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
)
SUBMITIT_LOCAL = (
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_JOB_ID",
    "",
)


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    The result is empty if no launcher started this process as one of several. The tasks of a job
    meet on its first node, at a port derived from the job id.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment:
        return {name: environment[name] for name in names if name in environment}
    local_launcher = environment.get("SUBMITIT_EXECUTOR") == "local"
    world, rank, local, job, nodes = SUBMITIT_LOCAL if local_launcher else SRUN
    if int(environment.get(world, 1)) == 1:
        return {}
    return {
        "RANK": environment[rank],
        "LOCAL_RANK": environment[local],
        "WORLD_SIZE": environment[world],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment.get(nodes, "")),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(FIRST_PORT + int(environment[job]) % PORTS),
    }


def first_node(nodes: str) -> str:
    """Returns the first host of a SLURM node list: `gpu[03-05,7],cpu1` gives `gpu03`.

    A single node is reached as 127.0.0.1.
    """
    if not re.search(r"[\[,]", nodes):
        return "127.0.0.1"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


class ProcessInfo(NamedTuple):
    """Rank, world size and device of a process.

    owns_group: this process created the process group and has to destroy it.
    """

    rank: int
    world: int
    device: "torch.device"
    owns_group: bool


def init_distributed(timeout: float, needs_group: bool = False) -> ProcessInfo:
    """Joins the process group described by the environment: NCCL between GPUs, Gloo on hosts.

    If a launcher shows each rank only one GPU, that one is used.

    Args:
        timeout: seconds after which a collective that does not return fails.
        needs_group: create a process group for a single rank too.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    owns_group = (world > 1 or needs_group) and not dist.is_initialized()
    if owns_group:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        single: dict[str, Any] = {}
        if world == 1:
            single = {"store": HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **single)
        if device.type == "cuda":
            # NCCL's watchdog aborts the process; Gloo raises an error that can be reported first
            later = timedelta(seconds=timeout + NCCL_MARGIN)
            group = dist.distributed_c10d._get_default_group()
            group._get_backend(device)._set_default_timeout(later)
    return ProcessInfo(rank, world, device, owns_group)


def with_rank_errors(timeout: float, work: Callable[[Any], Result], config: Any) -> Result:
    """Runs `work(config)` and turns a failed collective into one sentence that names the rank.

    Raises:
        UserError: a collective timed out after `timeout` seconds.
        PeerRankError: the connection to another rank was lost; that rank's error is the cause.
    """
    rank = os.environ.get("RANK", "0")
    try:
        return work(config)
    except (UserError, OSError):
        raise
    except Exception as error:
        message = str(error) if isinstance(error, RuntimeError) else ""
        if TIMED_OUT.search(message):
            raise UserError(
                f"rank {rank} timed out after waiting {timeout:g} s for another rank: look at the "
                f"last lines of the run's logs/rank_*.log for the one that hangs, or raise "
                f"engine.timeout="
            ) from error
        if CONNECTION_LOST.search(message):
            time.sleep(PEER_GRACE)
            raise PeerRankError(
                f"rank {rank} lost the connection to another rank; that rank's error is the cause"
            ) from error
        print(f"rank {rank} failed:", file=sys.stderr, flush=True)
        raise
