"""Starts the ranks of a run on this machine, unless a launcher has started them already."""

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

from cosyexp.config import EngineConfig
from cosyexp.distributed import rank_environment, with_rank_errors
from cosyexp.errors import PeerRankError, UserError
from cosyexp.training.signals import PREEMPTED, preemption_blocked

Job = TypeVar("Job")
Result = TypeVar("Result")
GRACE = 3.0  # seconds that the other ranks have to end by themselves, and once more after SIGTERM


def launch(work: Callable[[Job], Result], job: Job, engine: EngineConfig) -> Result:
    """Runs `work(job)` in every rank and returns what rank 0 returned.

    torchrun, deepspeed, srun or submitit take precedence: under one of them this process is one
    rank. Else `engine.nproc_per_node` processes are started, "auto" being one per GPU and one on a
    machine without.

    Raises:
        UserError: a rank failed, or more processes than GPUs are asked for.
    """
    with preemption_blocked():
        resource_tracker.ensure_running()  # Python's helper process for the queues of workers
    if variables := rank_environment(os.environ):
        os.environ.update(variables)
        # @record writes the error file that torchrun asks for
        recorded = record(partial(with_rank_errors, engine.timeout, work))
        result = cast(Result, recorded(job))
        atexit.register(_exit)
        return result
    processes, gpus = ranks_here(engine), torch.cuda.device_count()
    if processes == 1:
        return work(job)
    if 0 < gpus < processes:
        raise UserError(
            f"engine.nproc_per_node={processes} must be <= {gpus}, the GPUs of this machine: give "
            f"fewer, or auto"
        )
    return _start(work, job, processes, engine.timeout)


def ranks_here(engine: EngineConfig) -> int:
    """Returns the number of processes of `engine.nproc_per_node`; "auto": one per GPU."""
    wanted = engine.nproc_per_node
    return max(torch.cuda.device_count(), 1) if wanted == "auto" else int(wanted)


def _start(work: Callable[[Job], Result], job: Job, processes: int, timeout: float) -> Result:
    """Starts ranks, and ends all of them when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", max((os.cpu_count() or 1) // processes, 1))
    variables = {
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
    }
    results = mp.get_context("spawn").SimpleQueue()
    args = (work, job, variables, timeout, results)
    with preemption_blocked():
        context = start_processes(_rank, args, processes, join=False, start_method="spawn")
    received: list[Result | Exception] = []
    # it would log how it ends the other ranks
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    end: ProcessExitedException | None = None
    with _forward_signals(context.pids()) as forwarded:
        try:
            while not context.join(timeout=0.2, grace_period=GRACE):
                if not results.empty():  # a rank blocks until its result is read
                    received.append(results.get())
        except ProcessExitedException as error:
            end = error
    while not results.empty():
        received.append(results.get())
    errors = [result for result in received if isinstance(result, Exception)]
    errors.sort(key=lambda error: isinstance(error, PeerRankError))
    if end is not None and all(isinstance(error, PeerRankError) for error in errors):
        _raise_silent_end(end, forwarded)
    if errors:
        raise errors[0]
    if not received:  # Ctrl-C before there was anything to save
        raise KeyboardInterrupt
    (result,) = received
    assert not isinstance(result, Exception)
    return result


def _rank(
    rank: int,
    work: Callable[[Any], Any],
    job: Any,
    variables: Mapping[str, Any],
    timeout: float,
    results: Any,
) -> None:
    """Runs `work(job)` in a started process, and puts the result or the error into a queue."""
    own = {**variables, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    # data workers start as in a process that was not spawned
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    try:
        result = with_rank_errors(timeout, work, job)
        if rank == 0:
            results.put(result)
    except (UserError, OSError) as error:  # reported in one sentence, without a traceback
        results.put(error)
        raise SystemExit(1) from None
    except Exception as error:
        traceback.print_exc()
        name = type(error).__name__
        results.put(UserError(f"rank {rank} failed with {name}: {error}; see its traceback above"))
        raise SystemExit(1) from None
    _exit()


def _exit() -> None:
    """Ends a rank that is done at once: a thread of torch may abort an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _raise_silent_end(end: ProcessExitedException, forwarded: list[int]) -> NoReturn:
    """Explains a rank that ended without a result: by a signal, or by something from outside."""
    ended_by = getattr(signal, end.signal_name or "", None)
    if ended_by in forwarded:
        signal.raise_signal(ended_by)  # has the effect that it had on the rank
    what = f"was ended by {end.signal_name}" if end.signal_name else f"exited with {end.exit_code}"
    memory = ", as the system does when memory runs out" if end.signal_name == "SIGKILL" else ""
    raise UserError(
        f"rank {end.error_index} {what}{memory}: repeat the command to resume from the last "
        f"checkpoint"
    ) from None


@contextmanager
def _forward_signals(pids: list[int]) -> Iterator[list[int]]:
    """Forwards signals to the ranks; yields the list of those that were forwarded.

    Ctrl-C reaches the ranks without help, as they share the terminal.
    """
    forwarded: list[int] = []

    def forward(number: int, _: object) -> None:
        forwarded.append(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
        PREEMPTED: signal.signal(PREEMPTED, forward),
    }
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
