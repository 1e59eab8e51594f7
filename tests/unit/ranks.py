"""What ranks do in the tests; a module of its own, as every rank imports it."""

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from cosyexp.errors import UserError

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


def give_much(config: Mapping[str, Any]) -> tuple[str, bytes]:
    return config["word"] + os.environ["RANK"] + os.environ["WORLD_SIZE"], bytes(LARGE)


def validate(config: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The validation losses of new trainers, by model. ports: one for each, as a process group does not let go of its own at once."""
    import torch

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
