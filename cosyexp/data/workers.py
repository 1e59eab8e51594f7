"""An ordered, bounded map over a pool of processes."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Workers:
    """A pool of processes that apply a function to many jobs and return the results in order.

    The processes ignore Ctrl-C, which the parent alone handles.

    Args:
        count: number of processes; 1 runs the jobs in the current process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        context = get_context("spawn")
        initializer = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
        self.pool = (
            ProcessPoolExecutor(count, mp_context=context, initializer=initializer)
            if count > 1
            else None
        )

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
            pending.append(self.pool.submit(function, job))
            if len(pending) > 2 * self.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
