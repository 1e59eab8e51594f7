"""One rank among others: how it joins them, and what it says when it, or another one, comes to an end."""

import os
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cosyexp.errors import LostRankError, UserError

Outcome = TypeVar("Outcome")
MARGIN = 60.0  # seconds that NCCL waits longer than Gloo
GRACE = 2.0  # seconds that a rank keeps silent that only lost another one, whose reason is to be heard first
LATE = re.compile(r"timed? ?out", re.IGNORECASE)
LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|communicator was aborted",
    re.IGNORECASE,
)


class Rank(NamedTuple):
    """rank, world: this process and the number of processes. device: its own. joined: a group was made, which is to be left."""

    rank: int
    world: int
    device: torch.device
    joined: bool


def join(timeout: float, alone: bool = False) -> Rank:
    """Joins the other ranks that the environment speaks of: NCCL between GPUs, Gloo between hosts.

    timeout: seconds after which a collective that does not come back ends the run. alone: makes a process group also for one rank,
    which else needs none. Where a launcher shows each rank its own GPU alone, that one is taken.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        )
        torch.cuda.set_device(device)
    joined = (world > 1 or alone) and not dist.is_initialized()
    if joined:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        own: dict[str, Any] = (
            {"store": HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        )
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **own)
        if (
            device.type == "cuda"
        ):  # whose own watchdog aborts the process, where a timeout of Gloo is an error that can be told
            later = timedelta(seconds=timeout + MARGIN)
            dist.distributed_c10d._get_default_group()._get_backend(device)._set_default_timeout(
                later
            )
    return Rank(rank, world, device, joined)


def speaking(timeout: float, work: Callable[[Any], Outcome], config: Any) -> Outcome:
    """Runs `work(config)`; a rank that waits in vain says so in a sentence, and one that fails says which it is."""
    rank = os.environ.get("RANK", "0")
    try:
        return work(config)
    except (UserError, OSError):
        raise
    except Exception as error:
        said = str(error) if isinstance(error, RuntimeError) else ""
        if LATE.search(said):
            raise UserError(
                f"rank {rank} waited {timeout:g} s in vain for another rank: look at the last lines of the run's logs/rank_*.log "
                f"for the one that hangs, or give it more time by engine.timeout="
            ) from error
        if LOST.search(said):
            time.sleep(GRACE)
            raise LostRankError(
                f"rank {rank} lost another rank, which ended before: its own words say why"
            ) from error
        print(f"rank {rank} failed:", file=sys.stderr, flush=True)
        raise
