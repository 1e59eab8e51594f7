"""Trains several runs in the same ranks; a module of its own, as every rank imports it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cosyexp.config import TrainConfig
from cosyexp.training.build import Job, train


def restarts(configs: Sequence[TrainConfig]) -> None:
    """Trains one config after the other, in every rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for config in configs:
        train(Job(config))
