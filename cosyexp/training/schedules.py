"""Learning-rate schedules: pure functions of the number of updates done, so that they have no state to save.

Each is called as `schedule(update, lr)` with the updates done so far and the base learning rate, and returns the rate of the next
update. To add one, write a function and name it in `conf/scheduler/`.
"""


def constant(update: int, lr: float, *, warmup: int = 0) -> float:
    """`lr`, after a linear rise over `warmup` updates."""
    return lr * min((update + 1) / (warmup + 1), 1.0)


def warmup(update: int, lr: float, *, steps: int) -> float:
    """Linear to `lr` over `steps` updates, then down with the inverse square root (Vaswani et al. 2017, eq. 3)."""
    n = update + 1
    if steps == 0:
        return float(lr * n**-0.5)
    return float(lr * steps**0.5 * min(n**-0.5, n * steps**-1.5))


def noam_hold(
    update: int,
    lr: float,
    *,
    steps: int,
    warmup: float = 0.0,
    hold: float = 0.0,
    decay: float = 0.5,
    lowest: float = 0.0,
) -> float:
    """Linear warm-up, a plateau at `lr`, then down with a power of the update (Squeezeformer, Kim et al. 2022, section 4.1).

    steps: updates in all; behind them the rate stays at `lowest`. warmup, hold: updates, or a share of `steps` where below 1.
    """
    rising = int(warmup * steps) if warmup < 1 else int(warmup)
    plateau = rising + (int(hold * steps) if hold < 1 else int(hold))
    if update < rising:
        return lr * (update + 1) / (rising + 1)
    if update <= plateau:
        return lr
    if update > steps:
        return lowest
    factor = max(rising, 1) ** decay / max(update - (plateau - rising), 1) ** decay
    return max(lr * factor, lowest)
