"""Runs that are stopped and started again under several engines; a module of its own, as every rank imports it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from cosyexp.training import session


def restarts(config: Mapping[str, Any]) -> None:
    """Each of `runs`, one after the other, in the same ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for settings in config["runs"]:
        session.run(settings)
