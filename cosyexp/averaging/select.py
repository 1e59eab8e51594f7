"""Which checkpoints are averaged."""

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cosyexp.averaging.candidates import Candidate, CheckpointFolder
from cosyexp.errors import UserError

log = logging.getLogger(__name__)
DEFAULT = {"best": 5, "last": 5, "ema": 1, "window": None}  # how many; None: all


@dataclass(frozen=True)
class Choice:
    """The `num` best by a validation metric (lower is better), or the newest; all those of a window, if `num` is None.

    how: "best", "last", "window", or "ema", the newest running means. window: only checkpoints from a step to a step, both included.
    strict: fewer than `num` are refused.
    """

    how: str
    num: int | None = None
    metric: str = "loss"
    window: Sequence[int] | None = None
    strict: bool = True

    @property
    def wanted(self) -> int | None:
        return DEFAULT[self.how] if self.num is None else self.num

    @property
    def name(self) -> str:
        """Of its folder: best5, best3-mse, window1000-2000, last3-window1000-2000."""
        how = "last" if self.how == "window" else self.how
        number = "" if self.wanted is None else f"{how}{self.wanted}"
        metric = self.metric if how == "best" and self.metric != "loss" else ""
        stretch = "" if self.window is None else f"window{self.window[0]}-{self.window[1]}"
        return "-".join(part for part in (number, metric, stretch) if part)


def select(candidates: CheckpointFolder, choice: Choice) -> list[Candidate]:
    """Those that are chosen and whose checksums hold: the best first, or the newest first. UserError where there are none, or too few."""
    _check(choice)
    where, wanted = candidates.folder, choice.wanted
    if not candidates.found:
        raise UserError(f"{where} has no checkpoint that can be read: train it further")
    found = candidates.found[::-1]
    if choice.window is not None:
        steps = sorted(candidate.step for candidate in found)
        begin, end = choice.window
        found = [candidate for candidate in found if begin <= candidate.step <= end]
        if not found:
            raise UserError(
                f"{where} has no checkpoint from step {begin} to {end}: it has those of steps {steps[0]} to {steps[-1]}"
            )
    if choice.how == "best":
        found = [
            candidate
            for candidate in found
            if math.isfinite(candidate.losses.get(choice.metric, math.nan))
        ]
        found.sort(key=lambda candidate: candidate.losses[choice.metric])
        if not found:
            raise UserError(
                f"{where} has no checkpoint with a validation {choice.metric}: train it further, or give select=last"
            )
    chosen = list(_sound(found, wanted))
    if not chosen:
        raise UserError(f"{where} has no checkpoint that can be read: train it further")
    if wanted is not None and len(chosen) < wanted:
        if choice.strict:
            raise UserError(
                f"{where} has {len(chosen)} checkpoints to choose from, not num={wanted}: give a smaller num, or strict=false"
            )
        log.warning(
            "%s has %d checkpoints to choose from, not num=%d: these are averaged",
            where,
            len(chosen),
            wanted,
        )
    return chosen


def _check(choice: Choice) -> None:
    if choice.num is not None and choice.num < 1:
        raise UserError(f"num={choice.num} is no number of checkpoints: give num=1 or more")
    if choice.how == "window" and choice.window is None:
        raise UserError(
            "select=window takes the checkpoints from one step to another: give window=[from,to]"
        )
    if choice.window is not None and not (
        len(choice.window) == 2 and choice.window[0] <= choice.window[1]
    ):
        raise UserError(
            f"window={list(choice.window)} is no stretch of steps: give window=[from,to]"
        )


def _sound(found: Sequence[Candidate], wanted: int | None) -> Iterator[Candidate]:
    """The first `wanted` whose checksums hold, several being read at a time; says which are passed over."""
    wanted = len(found) if wanted is None else wanted
    with ThreadPoolExecutor() as pool:
        while wanted and found:
            batch, found = found[:wanted], found[wanted:]
            for candidate, corruption in zip(
                batch, pool.map(lambda candidate: candidate.corruption(), batch), strict=True
            ):
                if corruption:
                    log.warning("%s is passed over: %s", candidate.checkpoint, corruption)
                else:
                    wanted -= 1
                    yield candidate
