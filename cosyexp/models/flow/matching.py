"""Conditional flow matching between noise and mel (Lipman et al. 2023, section 4.1; optimal-transport path).

B batch, F mel bands, T mel frames.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

SIGMA_MIN = 1e-6  # what is left of the noise at t = 1


def probability_path(mel: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point y_t = (1 - (1 - sigma) t) z + t x on the way from noise to mel, and its velocity u = x - (1 - sigma) z.

    mel, noise: (B, F, T); t in [0, 1]: (B,).
    """
    t = t[:, None, None]
    return (1 - (1 - SIGMA_MIN) * t) * noise + t * mel, mel - (1 - SIGMA_MIN) * noise


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], noise_BFT: Tensor, steps: int = 10
) -> Tensor:
    """Follows `velocity(y, t)` from noise to mel over times 1 - cos(pi / 2 * i / steps), dense near the noise.

    `t` is (B,). Returns the mel (B, F, T).
    """
    times = [1 - math.cos(math.pi / 2 * i / steps) for i in range(steps + 1)]
    y = noise_BFT
    for now, then in pairwise(times):
        y = y + (then - now) * velocity(
            y, torch.full((y.size(0),), now, dtype=y.dtype, device=y.device)
        )
    return y


def guided(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + w) v_c - w v_u."""
    return (1 + strength) * conditional - strength * unconditional


class FlowMatching(nn.Module):
    """Holds the estimator under the name it has in the official checkpoints."""

    def __init__(self, estimator: nn.Module) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(
        self,
        x_BFT: Tensor,
        mask_B1T: Tensor,
        mu_BFT: Tensor,
        t_B: Tensor,
        spks_BF: Tensor,
        cond_BFT: Tensor,
        streaming_B: Tensor | None = None,
    ) -> Tensor:
        return self.estimator(x_BFT, mask_B1T, mu_BFT, t_B, spks_BF, cond_BFT, streaming_B)

    def sample(
        self,
        noise_BFT: Tensor,
        mu_BFT: Tensor,
        spks_BF: Tensor,
        cond_BFT: Tensor,
        steps: int,
        guidance: float,
        streaming: bool,
    ) -> Tensor:
        """The mel of rows without padding; with and without conditions in one call on twice the rows."""
        mask = torch.ones_like(noise_BFT[:, :1]).repeat(2, 1, 1)
        mu, spks, cond = (torch.cat([x, torch.zeros_like(x)]) for x in (mu_BFT, spks_BF, cond_BFT))
        chunked = torch.full((len(mask),), streaming, device=mask.device) if streaming else None

        def velocity(y: Tensor, t: Tensor) -> Tensor:
            both = self.estimator(y.repeat(2, 1, 1), mask, mu, t.repeat(2), spks, cond, chunked)
            return guided(both[: len(y)], both[len(y) :], guidance)

        return euler(velocity, noise_BFT, steps)
