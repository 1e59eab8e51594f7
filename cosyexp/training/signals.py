"""A request to stop: Ctrl-C and SIGTERM finish the step and save, a second one ends at once. SIGUSR2 is SLURM's: the job will come back."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

PREEMPTED = signal.SIGUSR2  # sent before a time limit or a preemption, as submitit asks for it
SIGNALS = (signal.SIGINT, signal.SIGTERM, PREEMPTED)


class StopRequest:
    """Within it the signals only set a flag. Truthy once one came.

    preempted: whether the run is to be started again; once all ranks agreed to stop, the same in all.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.preempted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [PREEMPTED])
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, total: Callable[[Sequence[float]], list[float]]) -> bool:
        """Whether any rank was asked to stop. total: sums over ranks."""
        asked, preempted = total([float(bool(self)), float(self.preempted)])
        self.preempted = preempted > 0
        return asked > 0

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if (
            number == PREEMPTED
        ):  # comes to every process of a job, perhaps twice, and perhaps with SIGTERM
            self.preempted = True
        else:
            signal.signal(number, self._previous[self.signal])


@contextmanager
def preemption_blocked() -> Iterator[None]:
    """SLURM sends SIGUSR2 to every process of a job; what is started within this hears it not before it makes a `StopRequest`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [PREEMPTED])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requeue() -> None:
    """Hands a preemption, now that all is saved, to who handled its signal before: submitit's handler requeues the job, and exits."""
    handler = signal.getsignal(PREEMPTED)
    if callable(handler):
        handler(PREEMPTED, None)
