"""What ranks do in the tests; a module of its own, as every rank imports it. `python -m tests.unit.ranks crash` is for torchrun."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from cosyexp.distributed import init_distributed
from cosyexp.errors import UserError
from cosyexp.training.launch import launch
from cosyexp.training.signals import StopRequest

LONG = 300  # seconds, far above any limit of a test
LARGE = 10 * 2**20


def is_rank(number: int) -> bool:
    return int(os.environ["RANK"]) == number


def refuse(_: Mapping[str, Any]) -> None:
    if is_rank(1):
        raise UserError("rank 1 has no shoes: buy some")
    time.sleep(LONG)


def die(_: Mapping[str, Any]) -> None:
    if is_rank(1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG)


def crash(_: Mapping[str, Any]) -> None:
    if is_rank(1):
        raise AssertionError("a bug of ours")
    time.sleep(LONG)


def hang(config: Mapping[str, Any]) -> None:
    """Rank 0 waits for rank 1, which is deaf to SIGTERM, as in a run."""
    me = init_distributed(config["engine"]["timeout"])
    with StopRequest():
        if me.rank == 1:
            time.sleep(LONG)
        dist.all_reduce(torch.ones(1))


def crash_beside_a_waiting_rank(config: Mapping[str, Any]) -> None:
    me = init_distributed(config["engine"]["timeout"])
    if me.rank == 1:
        raise AssertionError("a bug of ours")
    dist.all_reduce(torch.ones(1))


def never_start(config: Mapping[str, Any]) -> None:
    if is_rank(1):
        time.sleep(LONG)
    init_distributed(config["engine"]["timeout"])


def listen(config: Mapping[str, Any]) -> bool:
    """A preemption comes to every rank and to the process that started them, before they listen and again while they do."""
    me = init_distributed(config["engine"]["timeout"])

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
        dist.barrier()
        return stop.agreed(list) and stop.preempted


def do_not_listen(_: Mapping[str, Any]) -> None:
    if is_rank(0):
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(LONG)


def give_much(config: Mapping[str, Any]) -> tuple[str, bytes]:
    return config["word"] + os.environ["RANK"] + os.environ["WORLD_SIZE"], bytes(LARGE)


def validate(config: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The validation losses of new trainers, by model. ports: one for each, as a process group does not let go of its own at once."""
    from tests.invariants.trajectory import trainer_of

    torch.set_num_threads(1)
    found = {}
    for (model, settings), port in zip(config["models"].items(), config["ports"], strict=True):
        if "RANK" in os.environ:
            os.environ["MASTER_PORT"] = str(port)
        trainer = trainer_of(settings, double=False)
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        assert trainer.validation.rounds > 1
        assert trainer.validate()
        trainer.engine.close()
        found[model] = trainer.progress.losses
    return found


if __name__ == "__main__":
    launch(globals()[sys.argv[1]], {"engine": {"nproc_per_node": 1, "timeout": 3}})
