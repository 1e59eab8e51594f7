"""Conditional flow matching from noise to mel (Lipman et al. 2023, section 4.1, OT path).

B batch, F mel bands, T mel frames.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

SIGMA_MIN = 1e-6  # share of the noise that is left at t = 1


def probability_path(mel: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a point on the optimal-transport path from noise to mel, and the velocity there.

    y_t = (1 - (1 - sigma) t) z + t x and u = x - (1 - sigma) z, for mel x and noise z
    (Lipman et al. 2023, eq. 22 and 23).

    Args:
        mel: The mel spectrograms, (B, F, T).
        noise: Standard normal noise, (B, F, T).
        t: The time of each row, in [0, 1], (B,).

    Returns:
        The point y_t and the velocity u, (B, F, T) each.
    """
    t = t[:, None, None]
    return (1 - (1 - SIGMA_MIN) * t) * noise + t * mel, mel - (1 - SIGMA_MIN) * noise


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], noise_BFT: Tensor, steps: int = 10
) -> Tensor:
    """Integrates a velocity field from noise to mel with Euler steps.

    The times are 1 - cos(pi / 2 * i / steps), so that steps are small near the noise
    (Du et al. 2024, "CosyVoice", section 2.3).

    Args:
        velocity: Maps y (B, F, T) and the time (B,) to the velocity (B, F, T).
        noise_BFT: Standard normal noise, the starting point.
        steps: Number of steps.

    Returns:
        The mel spectrograms, (B, F, T).
    """
    times = [1 - math.cos(math.pi / 2 * i / steps) for i in range(steps + 1)]
    y = noise_BFT
    for t, t_next in pairwise(times):
        t_B = torch.full((y.size(0),), t, dtype=y.dtype, device=y.device)
        y = y + (t_next - t) * velocity(y, t_B)
    return y


def guided(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Applies classifier-free guidance, (1 + w) v_c - w v_u (Ho & Salimans 2022, eq. 6)."""
    return (1 + strength) * conditional - strength * unconditional


def sample(
    velocity: Callable[..., Tensor],
    noise_BFT: Tensor,
    conditions: Sequence[Tensor],
    *,
    guidance: float,
    steps: int = 10,
) -> Tensor:
    """Generates mel spectrograms with classifier-free guidance (Ho & Salimans 2022).

    The velocities with and without conditions come from one call on twice the rows.

    Args:
        velocity: Maps y, the time and the conditions of 2B rows to their velocity.
        noise_BFT: Standard normal noise.
        conditions: What the second half of the rows has zeros for; each begins with B.
        guidance: Strength of the guidance.
        steps: Number of Euler steps.

    Returns:
        The mel spectrograms, (B, F, T).
    """
    twice = [torch.cat([x, torch.zeros_like(x)]) for x in conditions]

    def guided_velocity(y: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = velocity(y.repeat(2, 1, 1), t.repeat(2), *twice).chunk(2)
        return guided(conditional, unconditional, guidance)

    return euler(guided_velocity, noise_BFT, steps)


class FlowMatching(nn.Module):
    """Wraps the velocity estimator under its name in the official checkpoints.

    Mirrors `ConditionalCFM` of the original CosyVoice.

    Args:
        estimator: The velocity estimator, `UNet` or `DiT`.
    """

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
        """Estimates the velocity, (B, F, T); see the estimator for the arguments."""
        return self.estimator(x_BFT, mask_B1T, mu_BFT, t_B, spks_BF, cond_BFT, streaming_B)
