"""An ordered, bounded map over a pool of processes."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Workers:
    """A pool of processes that apply a function to many jobs and return the results in order.

    Ctrl-C is blocked in the processes from their start: the parent alone handles it.

    Args:
        count: number of processes; 1 runs the jobs in the current process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        context = get_context("spawn")
        self.pool = ProcessPoolExecutor(count, mp_context=context) if count > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[In], Out], jobs: Iterable[In]) -> Iterator[Out]:
        """Applies a function to every job and yields the results in the order of the jobs.

        Only a few jobs are submitted ahead, so that neither jobs nor results pile up in memory.
        """
        if self.pool is None:
            yield from map(function, jobs)
            return
        pending: deque[Future[Out]] = deque()
        for job in jobs:
            with interrupts_blocked():
                pending.append(self.pool.submit(function, job))
            if len(pending) > 2 * self.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block; processes that are started in it never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
