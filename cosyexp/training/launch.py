"""Starts the ranks of a run on this machine, unless torchrun or another launcher has started them already."""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException, start_processes

from cosyexp.errors import UserError

Outcome = TypeVar("Outcome")
Work = Callable[[Mapping[str, Any]], Outcome]
GRACE = 2.0  # seconds


def launch(work: Work[Outcome], config: Mapping[str, Any]) -> Outcome:
    """Runs `work(config)` in every rank, and returns what rank 0's returned.

    `engine.nproc_per_node`: a number, or "auto" for one process a GPU, one on a machine without.
    """
    wanted = config["engine"]["nproc_per_node"]
    processes = max(torch.cuda.device_count(), 1) if wanted == "auto" else int(wanted)
    if processes == 1 or "RANK" in os.environ:
        return work(config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", max((os.cpu_count() or 1) // processes, 1))
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    results = mp.get_context("spawn").SimpleQueue()
    context = start_processes(_rank, (work, config, shared, results), processes, join=False, start_method="spawn")
    heard: list[Outcome | Exception] = []
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells how it ends the other ranks
    with _signals_go_to(context.pids()):
        try:
            while not context.join(timeout=0.2):
                if not results.empty():  # a rank cannot end before its words are heard
                    heard.append(results.get())
        except ProcessException:
            while not results.empty():
                heard.append(results.get())
            if not any(isinstance(outcome, Exception) for outcome in heard):  # a fault of ours, or killed from outside
                raise
    while not results.empty():
        heard.append(results.get())
    for outcome in heard:
        if isinstance(outcome, Exception):
            raise outcome
    (result,) = heard
    assert not isinstance(result, Exception)
    return result


def _rank(rank: int, work: Work[Any], config: Mapping[str, Any], shared: Mapping[str, Any], results: Any) -> None:
    os.environ.update({name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
    torch.set_num_threads(int(shared["OMP_NUM_THREADS"]))
    try:
        outcome = work(config)
        if rank == 0:
            results.put(outcome)
    except (UserError, OSError) as error:  # the user's to mend: a sentence, not this rank's traceback
        results.put(error)
        raise SystemExit(1) from None
    except Exception:
        time.sleep(GRACE)  # perhaps only because another rank is gone, whose reason is to be heard first
        raise


@contextmanager
def _signals_go_to(pids: list[int]) -> Iterator[None]:
    """The ranks hear Ctrl-C themselves, as they share the terminal; SIGTERM comes to this process alone, and is passed on."""

    def pass_on(number: int, _: object) -> None:
        for pid in pids:
            os.kill(pid, number)

    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
