"""Which checkpoints of a run are averaged."""

import math

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import Checkpoint
from cosyexp.run.directory import RunDirectory


def select(run: RunDirectory, how: str, num: int, metric: str, strict: bool) -> list[Checkpoint]:
    """The `num` best by a validation metric (lower is better), or the `num` last, whose hashes hold; newest last.

    Raises UserError where there are fewer, unless `strict` is false.
    """
    if num < 1:
        raise UserError(f"num={num} is no number of checkpoints: give num=1 or more")
    found = run.checkpoints.all()[::-1]
    if how == "best":
        found = [c for c in found if math.isfinite(c.losses.get(metric, math.nan))]
        found.sort(key=lambda checkpoint: checkpoint.losses[metric])
    chosen: list[Checkpoint] = []
    for checkpoint in found:
        if len(chosen) < num and run.checkpoints.is_sound(checkpoint):
            chosen.append(checkpoint)
    if not chosen and how == "best":
        raise UserError(f"{run} has no checkpoint with a validation {metric}: train it further, or give select=last")
    if not chosen:
        raise UserError(f"{run} has no checkpoint that can be read: train it further")
    if len(chosen) < num and strict:
        raise UserError(f"{run} has {len(chosen)} checkpoints to choose from, not num={num}: give a smaller num, or strict=false")
    return sorted(chosen, key=lambda checkpoint: checkpoint.step)
