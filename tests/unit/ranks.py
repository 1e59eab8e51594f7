"""Work that ranks do in the tests; a module on its own, as every rank imports it.

`python -m tests.unit.ranks crash` is started by torchrun.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cosyexp.config import EngineConfig, TrainConfig
from cosyexp.distributed import init_distributed
from cosyexp.errors import UserError
from cosyexp.training.launch import launch
from cosyexp.training.signals import StopRequest

if TYPE_CHECKING:  # most ranks need no trainer, whose imports take seconds
    from cosyexp.training.trainer import Trainer

TIMEOUT = 3  # seconds that a rank waits for another
LONG = 60  # seconds, far above any limit of a test
LARGE = 10 * 2**20  # bytes


def is_rank(number: int) -> bool:
    """Whether this process is a rank."""
    return int(os.environ["RANK"]) == number


def wait_to_be_ended() -> None:
    """Waits for the launcher to end this rank, and fails if it does not."""
    time.sleep(LONG)
    raise AssertionError("nobody ended this rank")


def raise_user_error(_: object) -> None:
    """Rank 1 reports an error of the user."""
    if is_rank(1):
        raise UserError("rank 1 has no shoes: buy some")
    wait_to_be_ended()


def die(_: object) -> None:
    """Rank 1 is killed."""
    if is_rank(1):
        os.kill(os.getpid(), signal.SIGKILL)
    wait_to_be_ended()


def crash(_: object) -> None:
    """Rank 1 has a bug."""
    if is_rank(1):
        raise AssertionError("a bug of ours")
    wait_to_be_ended()


def hang(_: object) -> None:
    """Rank 0 waits for rank 1, which ignores SIGTERM, as in a run."""
    me = init_distributed(TIMEOUT)
    with StopRequest():
        if me.rank == 1:
            wait_to_be_ended()
        dist.all_reduce(torch.ones(1))


def crash_while_another_waits(_: object) -> None:
    """Rank 1 has a bug while rank 0 waits for it."""
    me = init_distributed(TIMEOUT)
    if me.rank == 1:
        raise AssertionError("a bug of ours")
    dist.all_reduce(torch.ones(1))


def never_start(_: object) -> None:
    """Rank 1 never joins the process group."""
    if is_rank(1):
        wait_to_be_ended()
    init_distributed(TIMEOUT)


def stop_on_preemption(_: object) -> bool:
    """Every rank, and the process that started them, is preempted twice.

    The first time before the ranks handle signals, the second time while they do.

    Returns:
        Whether every rank noticed it, and was not ended by SIGTERM.
    """
    me = init_distributed(TIMEOUT)

    def preempt() -> None:
        if me.rank == 0:
            os.kill(os.getppid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)

    preempt()
    with StopRequest() as stop:
        preempt()
        os.kill(os.getpid(), signal.SIGTERM)  # some clusters send both
        while not stop:
            time.sleep(0.01)
        preempted = stop.agreed(list) == (True, False) and stop.preempted
        ranks = torch.tensor(int(preempted))
        dist.all_reduce(ranks, dist.ReduceOp.MIN)
        return bool(ranks)


def terminate_the_launcher(_: object) -> None:
    """Rank 0 sends SIGTERM to the process that started the ranks, none of which handles it."""
    if is_rank(0):
        os.kill(os.getppid(), signal.SIGTERM)
    wait_to_be_ended()


def return_much(word: str) -> tuple[str, bytes]:
    """Returns the job, what this rank is, and many bytes."""
    return word + os.environ["RANK"] + os.environ["WORLD_SIZE"], bytes(LARGE)


@dataclass(frozen=True)
class Validations:
    """Trainings whose first validation is computed.

    configs: by model. ports: one for each, as a process group keeps its port for a while.
    """

    configs: Mapping[str, TrainConfig]
    ports: list[int]


def trainer_of(config: TrainConfig) -> "Trainer":
    """Returns a trainer in memory that has not made a step, without loggers."""
    from cosyexp.run.directory import RunDirectory
    from cosyexp.training.build import assemble, build_engine

    trainer = assemble(config, RunDirectory(config.run_dir), build_engine(config))
    trainer.loggers = []
    trainer.setup()
    return trainer


def validate(job: Validations) -> dict[str, dict[str, float]]:
    """Returns the validation losses of new trainers, by model."""
    torch.set_num_threads(1)
    found = {}
    for (model, config), port in zip(job.configs.items(), job.ports, strict=True):
        if "RANK" in os.environ:
            os.environ["MASTER_PORT"] = str(port)
        trainer = trainer_of(config)
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        assert trainer.validation is not None and trainer.validation.rounds > 1
        assert trainer.validate()
        trainer.engine.close()
        found[model] = trainer.progress.losses
    return found


if __name__ == "__main__":
    launch(globals()[sys.argv[1]], None, EngineConfig(nproc_per_node=1, timeout=TIMEOUT))
