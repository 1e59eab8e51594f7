"""Turns signals into a request to stop, so that a run finishes its step and saves before it exits.

Ctrl-C (SIGINT) and SIGTERM request a stop; a second one ends the process at once. SIGUSR2 announces
a preemption by SLURM: the run stops in the same way, and the job is requeued to continue later.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# sent before a time limit or a preemption, as submitit configures its jobs
PREEMPTED = signal.SIGUSR2
SIGNALS = (signal.SIGINT, signal.SIGTERM, PREEMPTED)


class StopRequest:
    """A context manager within which the signals only set a flag; it is true once one has arrived.

    Its attribute `preempted` is whether the job will be requeued, as all ranks last agreed.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.preempted = False
        # apart from `preempted`, because a signal may arrive while the ranks agree
        self._preemption_announced = False
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [PREEMPTED])
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(
        self, total: Callable[[Sequence[float]], list[float]], ended: bool = False
    ) -> tuple[bool, bool]:
        """Returns what holds on any rank; all ranks call it.

        Args:
            total: returns the sums of some values over all ranks.
            ended: whether a callback of this rank ends the training.

        Returns:
            Whether the run was requested to stop, and whether a callback ends it.
        """
        own = [float(bool(self)), float(self._preemption_announced), float(ended)]
        requested, preempted, ends = total(own)
        self.preempted = preempted > 0
        return requested > 0, ends > 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # SIGUSR2 may come twice, or with SIGTERM, so a second one must not end the process.
        if number == PREEMPTED:
            self._preemption_announced = True
        else:
            signal.signal(number, self._previous[self.signal])


@contextmanager
def preemption_blocked() -> Iterator[None]:
    """Blocks SIGUSR2 in child processes that are started within the block.

    SLURM sends SIGUSR2 to every process of a job. In a child it stays pending until the child
    enters a `StopRequest`, which unblocks it; otherwise it would kill the child.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [PREEMPTED])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def requeue() -> None:
    """Calls the original handler of SIGUSR2, once everything is saved.

    Under SLURM this is submitit's handler, which requeues the job and exits.
    """
    handler = signal.getsignal(PREEMPTED)
    if callable(handler):
        handler(PREEMPTED, None)
