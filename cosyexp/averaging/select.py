"""Selects the checkpoints that are averaged."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cosyexp.averaging.candidates import Candidate, CheckpointFolder
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import BY_LOSS, Criterion

log = logging.getLogger(__name__)
DEFAULT_NUM = {"best": 5, "last": 5, "ema": 1, "window": None}  # None: all


@dataclass(frozen=True)
class Selection:
    """A rule that selects checkpoints.

    Attributes:
        rule: "best" by the criterion, "last", "ema" (the newest moving averages of training), or
            "window" (all of the window).
        num: how many; None: the default of the rule.
        criterion: validation metric that defines the best.
        window: first and last step of the checkpoints to select from; None: no limits.
        strict: whether fewer than `num` are an error.
    """

    rule: str
    num: int | None = None
    criterion: Criterion = BY_LOSS
    window: Sequence[int] | None = None
    strict: bool = True

    @property
    def count(self) -> int | None:
        """Number of checkpoints to select; None: all."""
        return DEFAULT_NUM[self.rule] if self.num is None else self.num

    @property
    def name(self) -> str:
        """Returns a folder name: best5, best3-mse, window1000-2000, last3-window1000-2000."""
        rule = "last" if self.rule == "window" else self.rule
        number = "" if self.count is None else f"{rule}{self.count}"
        metric = self.criterion.metric
        by = metric if rule == "best" and metric != "loss" else ""
        window = "" if self.window is None else f"window{self.window[0]}-{self.window[1]}"
        return "-".join(part for part in (number, by, window) if part)


def select(folder: CheckpointFolder, selection: Selection) -> list[Candidate]:
    """Returns the selected checkpoints whose checksums hold: the best, or the newest, first.

    The untrained weights of step 0 are never among the best, unless there are no others.

    Raises:
        UserError: there is none, or there are too few.
    """
    _check(selection)
    count, criterion = selection.count, selection.criterion
    if not folder.found:
        raise UserError(f"{folder.folder} has no readable checkpoint: train it further")
    candidates = folder.found[::-1]
    if selection.window is not None:
        steps = sorted(candidate.step for candidate in candidates)
        begin, end = selection.window
        candidates = [candidate for candidate in candidates if begin <= candidate.step <= end]
        if not candidates:
            raise UserError(
                f"{folder.folder} has no checkpoint from step {begin} to {end}: its checkpoints "
                f"are of steps {steps[0]} to {steps[-1]}"
            )
    if selection.rule == "best":
        candidates = criterion.rank(candidates)
        candidates = [c for c in candidates if not c.untrained] or candidates
        if not candidates:
            raise UserError(
                f"{folder.folder} has no checkpoint with a validation {criterion.metric}: train "
                f"it further, or give select=last"
            )
    selected = list(_intact(candidates, count))
    if not selected:
        raise UserError(f"{folder.folder} has no readable checkpoint: train it further")
    if count is not None and len(selected) < count:
        message = f"{folder.folder} has {len(selected)} such checkpoints, not num={count}"
        if selection.strict:
            raise UserError(f"{message}: give a smaller num, or strict=false")
        log.warning("%s: averaging these", message)
    return selected


def _check(selection: Selection) -> None:
    window = selection.window
    if selection.rule == "window" and window is None:
        raise UserError("select=window averages a range of steps: give window=[from,to]")
    if window is not None and not (len(window) == 2 and window[0] <= window[1]):
        raise UserError(f"window={list(window)} is not a range of steps: give window=[from,to]")


def _intact(candidates: Sequence[Candidate], count: int | None) -> Iterator[Candidate]:
    """Yields the first `count` whose checksums hold, reading several files at a time."""
    missing = len(candidates) if count is None else count
    with ThreadPoolExecutor() as pool:
        while missing and candidates:
            batch, candidates = candidates[:missing], candidates[missing:]
            checked = pool.map(lambda candidate: candidate.corruption(), batch)
            for candidate, corruption in zip(batch, checked, strict=True):
                if corruption:
                    log.warning("%s is skipped: %s", candidate.checkpoint, corruption)
                else:
                    missing -= 1
                    yield candidate
