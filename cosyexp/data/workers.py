"""Processes side by side."""

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
    """Processes that do one function over many jobs, in order; with `count` 1 it is this process. Ctrl-C is for the parent alone."""

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
        """A few jobs ahead, so that neither jobs nor results pile up."""
        if self.pool is None:
            yield from map(function, jobs)
            return
        under_way: deque[Future[Out]] = deque()
        for job in jobs:
            under_way.append(self.pool.submit(function, job))
            if len(under_way) > 2 * self.count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
