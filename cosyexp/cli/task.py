"""Which rank of a run this process is: torchrun and deepspeed say so in torch's words, srun and submitit in their own."""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 12000, 20000  # below those that Linux gives to outgoing connections

# the names under which a launcher of tasks tells: ranks, this rank, this rank on its node, the job, the nodes
SRUN = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
)
LOCAL = (
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_JOB_ID",
    "",
)


def rank_of(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; empty where no launcher made this process one of several.

    The tasks of a job find each other on its first node, at a port that follows from the job's number.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment:
        return {name: environment[name] for name in names if name in environment}
    world, rank, local, job, nodes = (
        LOCAL if environment.get("SUBMITIT_EXECUTOR") == "local" else SRUN
    )
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
    """`gpu[03-05,7],cpu1` -> gpu03; a job on one node needs no name for it."""
    if not re.search(r"[\[,]", nodes):
        return "127.0.0.1"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
