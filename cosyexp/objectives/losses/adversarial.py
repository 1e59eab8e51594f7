"""Losses of a GAN with several discriminators. Every loss has the shape (B,), one value per row.

A discriminator returns the list of its feature maps, batch first; the last one is its score map.
The arguments below hold one such list for each discriminator. Real and fake maps have the same
shapes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Maps = Sequence[Tensor]  # the feature maps of one discriminator


def per_row_mean(x: Tensor) -> Tensor:
    """Averages a tensor (B, ...) over all dimensions but the first, (B,)."""
    return x.flatten(1).mean(1)


def full(x: Tensor) -> Tensor:
    """Converts half precision to fp32; under autocast the maps are too coarse to be averaged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def discriminator_loss(real: Sequence[Maps], fake: Sequence[Maps]) -> Tensor:
    """Computes the least-squares loss of the discriminators (Mao et al. 2017, "LSGAN", eq. 9).

    It is the sum over discriminators of mean (1 - D(x))^2 + mean D(G(z))^2.
    """
    return total(
        [
            per_row_mean((1 - full(r[-1])).square()) + per_row_mean(full(f[-1]).square())
            for r, f in zip(real, fake, strict=True)
        ]
    )


def generator_loss(fake: Sequence[Maps]) -> Tensor:
    """Computes the least-squares loss of the generator (Mao et al. 2017, "LSGAN", eq. 9).

    It is the sum over discriminators of mean (1 - D(G(z)))^2.
    """
    return total([per_row_mean((1 - full(f[-1])).square()) for f in fake])


def feature_loss(real: Sequence[Maps], fake: Sequence[Maps]) -> Tensor:
    """Computes the feature matching loss (Kong et al. 2020, "HiFi-GAN", eq. 4; Larsen et al. 2016).

    It is 2 times the sum over all maps i, of all discriminators, of mean |D_i(x) - D_i(G(z))|.
    """
    pairs = [pair for r, f in zip(real, fake, strict=True) for pair in zip(r, f, strict=True)]
    return 2 * total([per_row_mean((full(r) - full(f)).abs()) for r, f in pairs])


def tpr_loss(
    better: Sequence[Maps], worse: Sequence[Maps], tau: float = 0.04, over: str = "row"
) -> Tensor:
    """Computes the truncated pointwise relativistic loss (Li et al. 2023, "HiFTNet", section 2.4).

    It is the sum over discriminators of tau - relu(tau - L). L is the mean of (d - m)^2 over the
    points where d = better - worse is below its median m, and 0 if there are no such points.

    Args:
        better: maps whose scores should be higher: the real ones for the discriminators, the fake
            ones for the generator.
        worse: the other maps.
        tau: upper bound of the loss of one discriminator.
        over: "row" computes median and mean for each row, "batch" over all rows at once, as the
            original CosyVoice does.
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
    """Adds tensors of the same shape."""
    return torch.stack(list(terms)).sum(0)
