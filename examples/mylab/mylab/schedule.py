"""A learning-rate schedule: a function of the updates so far."""

import math


def cosine(update: int, lr: float, *, steps: int, warmup: int = 0) -> float:
    """Linear warm-up, then half a cosine down to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    if update < warmup:
        return lr * (update + 1) / warmup
    done = min((update - warmup) / max(steps - warmup, 1), 1.0)
    return lr * 0.5 * (1 + math.cos(math.pi * done))
