"""Learning-rate schedules, as functions of the number of updates; they have no state to save.

A schedule is called as `schedule(update, lr)` with the number of updates done so far and the base
learning rate, and returns the learning rate of the next update. Its other arguments come from the
config. To add a schedule, write a function here and a YAML in `conf/scheduler/`.
"""

from cosyexp.arguments import Count
from cosyexp.registry import register


@register("scheduler")
def constant(update: int, lr: float, *, warmup: Count = 0) -> float:
    """Returns `lr`, after a linear rise over `warmup` updates."""
    return lr * min((update + 1) / (warmup + 1), 1.0)


@register("scheduler")
def warmup(update: int, lr: float, *, steps: Count) -> float:
    """Rises linearly to `lr` over `steps` updates, then decays with the inverse square root.

    It is the schedule of Vaswani et al. (2017, "Attention Is All You Need", eq. 3), scaled to peak
    at `lr`. With `steps=0` the rate is lr / sqrt(update + 1).
    """
    n = update + 1
    if steps == 0:
        return float(lr * n**-0.5)
    return float(lr * steps**0.5 * min(n**-0.5, n * steps**-1.5))


@register("scheduler")
def noam_hold(
    update: int,
    lr: float,
    *,
    steps: Count,
    warmup: float = 0.0,
    hold: float = 0.0,
    decay: float = 0.5,
    lowest: float = 0.0,
) -> float:
    """Rises linearly, stays at `lr`, then decays (Kim et al. 2022, "Squeezeformer", section 4.1).

    Args:
        update: number of updates done so far.
        lr: base learning rate.
        steps: number of updates of the run, after which the rate stays at `lowest`.
        warmup: number of updates of the rise, or a share of `steps` if below 1.
        hold: number of updates of the plateau, or a share of `steps` if below 1.
        decay: exponent of the decay.
        lowest: lower bound of the rate after the plateau.
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
