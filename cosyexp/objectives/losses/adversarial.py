"""Losses between a generator and its discriminators. Every function returns one number per row (segment), shape (B,).

A discriminator's output is the list of its feature maps, the score map last. Real and fake maps have the same shapes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Maps = Sequence[Tensor]  # of one discriminator, batch first


def per_row_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def full(x: Tensor) -> Tensor:
    """At least fp32: under autocast the maps are half precision, too coarse for means."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def discriminator_loss(real: Sequence[Maps], fake: Sequence[Maps]) -> Tensor:
    """Least squares (Mao et al. 2017, eq. 9): sum over discriminators of mean (1 - D(x))^2 + mean D(G(z))^2."""
    return total(
        [
            per_row_mean((1 - full(r[-1])).square()) + per_row_mean(full(f[-1]).square())
            for r, f in zip(real, fake, strict=True)
        ]
    )


def generator_loss(fake: Sequence[Maps]) -> Tensor:
    """Least squares (Mao et al. 2017, eq. 9): sum over discriminators of mean (1 - D(G(z)))^2."""
    return total([per_row_mean((1 - full(f[-1])).square()) for f in fake])


def feature_loss(real: Sequence[Maps], fake: Sequence[Maps]) -> Tensor:
    """Feature matching (Larsen et al. 2016; Kong et al. 2020, eq. 4): sum of mean |D_i(x) - D_i(G(z))|, taken twice."""
    pairs = [pair for r, f in zip(real, fake, strict=True) for pair in zip(r, f, strict=True)]
    return 2 * total([per_row_mean((full(r) - full(f)).abs()) for r, f in pairs])


def tpr_loss(
    better: Sequence[Maps], worse: Sequence[Maps], tau: float = 0.04, over: str = "row"
) -> Tensor:
    """Truncated pointwise relativistic loss (Li et al. 2023, "HiFTNet", section 2.4): tau - relu(tau - L), summed.

    L is the mean of (d - m)^2 over the points where d = better - worse lies below its median m; 0 where there is none.
    over: "row" takes median and mean in each row, "batch" over all rows at once, as the original does.
    """
    terms = []
    for b, w in zip(better, worse, strict=True):
        difference = (full(b[-1]) - full(w[-1])).flatten(1)
        rows = difference.size(0)
        if over == "batch":
            difference = difference.reshape(1, -1)
        excess = difference - difference.median(dim=1, keepdim=True).values
        below = (excess < 0).to(excess.dtype)
        loss = (excess.square() * below).sum(1) / below.sum(1).clamp(min=1)
        terms.append((tau - torch.relu(tau - loss)).expand(rows))
    return total(terms)


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(terms)).sum(0)
