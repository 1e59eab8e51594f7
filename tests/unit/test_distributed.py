"""The rank of a process, from the environment of its launcher."""

import pytest

from cosyexp.distributed import first_node, rank_environment

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "7",
}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}


def named(rank: str, local: str, world: str, address: str, port: str) -> dict[str, str]:
    """Returns the variables of a rank."""
    return {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": world,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (TORCHRUN, TORCHRUN),
        ({**SRUN, **TORCHRUN}, TORCHRUN),  # torchrun as a task of each node
        (SRUN, named("3", "1", "4", "gpu03", "12041")),
        (
            {**SRUN, "MASTER_PORT": "1234", "MASTER_ADDR": "here"},
            named("3", "1", "4", "here", "1234"),
        ),
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            {},
        ),  # one task starts its ranks itself
        (
            {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            {},
        ),  # in a script of sbatch, outside of srun
        (LOCAL, named("1", "1", "2", "127.0.0.1", "12007")),
        ({**SRUN, **LOCAL}, named("1", "1", "2", "127.0.0.1", "12007")),
    ],
)
def test_ranks_of_all_launchers(environment, expected):
    assert rank_environment(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "127.0.0.1"),
        ("n7,n9", "n7"),
        ("gpu[03-05,7],cpu1", "gpu03"),
        ("a-[12,14]-b", "a-12-b"),
        ("r[1-2]n[08-09]", "r1n08"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_jobs_of_one_node_do_not_meet_at_one_port():
    ports = {
        rank_environment({**SRUN, "SLURM_JOB_ID": str(job)})["MASTER_PORT"]
        for job in range(1000, 3000)
    }
    assert len(ports) == 2000 and all(12000 <= int(port) < 32000 for port in ports)
