"""Starts the ranks of a run on this machine, unless torchrun, deepspeed, srun or submitit have started them already."""

import atexit
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from cosyexp.distributed import rank_environment, with_rank_errors
from cosyexp.errors import PeerRankError, UserError
from cosyexp.training.signals import PREEMPTED, preemption_blocked

Outcome = TypeVar("Outcome")
Work = Callable[[Mapping[str, Any]], Outcome]
GRACE = 3.0  # seconds that the other ranks have to end by themselves, and once more after SIGTERM


def launch(work: Work[Outcome], config: Mapping[str, Any]) -> Outcome:
    """Runs `work(config)` in every rank, and returns what rank 0's returned.

    `engine.nproc_per_node`: a number, or "auto" for one process a GPU, one on a machine without. Another launcher's word counts more.
    """
    with preemption_blocked():
        resource_tracker.ensure_running()  # Python's module, for the queues of workers and ranks
    if rank := rank_environment(os.environ):
        os.environ.update(rank)
        told = record(
            partial(with_rank_errors, config["engine"]["timeout"], work)
        )  # torchrun asks for a record of what went wrong
        outcome = cast(Outcome, told(config))
        atexit.register(_leave)
        return outcome
    wanted, gpus = config["engine"]["nproc_per_node"], torch.cuda.device_count()
    processes = max(gpus, 1) if wanted == "auto" else int(wanted)
    if processes == 1:
        return work(config)
    if 0 < gpus < processes:
        raise UserError(
            f"engine.nproc_per_node={processes} is more than the {gpus} GPUs of this machine: give at most {gpus}, or auto"
        )
    return start(work, config, processes)


def start(work: Work[Outcome], config: Mapping[str, Any], processes: int) -> Outcome:
    """Starts ranks, and ends them all when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", max((os.cpu_count() or 1) // processes, 1))
    shared = {
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
    }
    results = mp.get_context("spawn").SimpleQueue()
    with preemption_blocked():
        context = start_processes(
            _rank, (work, config, shared, results), processes, join=False, start_method="spawn"
        )
    heard: list[Outcome | Exception] = []
    logging.getLogger("torch.multiprocessing.spawn").setLevel(
        logging.ERROR
    )  # it tells how it ends the other ranks
    end: ProcessExitedException | None = None
    with _signals_go_to(context.pids()) as passed_on:
        try:
            while not context.join(timeout=0.2, grace_period=GRACE):
                if not results.empty():  # a rank cannot end before its words are heard
                    heard.append(results.get())
        except ProcessExitedException as error:
            end = error
    while not results.empty():
        heard.append(results.get())
    errors = sorted(
        (outcome for outcome in heard if isinstance(outcome, Exception)),
        key=lambda error: isinstance(error, PeerRankError),
    )
    if end is not None and all(isinstance(error, PeerRankError) for error in errors):
        _explain(end, passed_on)
    if errors:
        raise errors[0]
    if not heard:  # Ctrl-C before anything was there to be saved
        raise KeyboardInterrupt
    (result,) = heard
    assert not isinstance(result, Exception)
    return result


def _rank(
    rank: int, work: Work[Any], config: Mapping[str, Any], shared: Mapping[str, Any], results: Any
) -> None:
    os.environ.update(
        {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
    )
    torch.set_num_threads(int(shared["OMP_NUM_THREADS"]))
    mp.set_start_method(
        mp.get_all_start_methods()[0], force=True
    )  # of workers: that of a process which was not spawned
    try:
        outcome = with_rank_errors(config["engine"]["timeout"], work, config)
        if rank == 0:
            results.put(outcome)
    except (
        UserError,
        OSError,
    ) as error:  # the user's to mend: a sentence, not this rank's traceback
        results.put(error)
        raise SystemExit(1) from None
    except Exception as error:
        traceback.print_exc()
        results.put(
            UserError(
                f"rank {rank} failed with {type(error).__name__}: {error}; its traceback stands above"
            )
        )
        raise SystemExit(1) from None
    _leave()


def _leave() -> None:
    """Ends a rank that is done: a thread of torch that is still at work would abort an orderly end, now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _explain(end: ProcessExitedException, passed_on: list[int]) -> NoReturn:
    """A rank ended without a word: by a signal that came before it could listen, or by something from outside."""
    ended_by = getattr(signal, end.signal_name or "", None)
    if ended_by in passed_on:
        signal.raise_signal(ended_by)  # means to this process what it meant before
    what = f"was ended by {end.signal_name}" if end.signal_name else f"exited with {end.exit_code}"
    memory = ", as the system does when memory runs out" if end.signal_name == "SIGKILL" else ""
    raise UserError(
        f"rank {end.error_index} {what}{memory}: repeat the command to go on from the last checkpoint"
    ) from None


@contextmanager
def _signals_go_to(pids: list[int]) -> Iterator[list[int]]:
    """The ranks hear Ctrl-C themselves, as they share the terminal; what comes to this process alone is passed on, and noted."""
    passed_on: list[int] = []

    def pass_on(number: int, _: object) -> None:
        passed_on.append(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        PREEMPTED: signal.signal(PREEMPTED, pass_on),
    }
    try:
        yield passed_on
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
