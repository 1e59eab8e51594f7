"""Losses of a preference pair, from the log-probabilities of its chosen and its rejected answer. Every tensor is (B,), a value a pair.

h = (policy(chosen) - policy(rejected)) - (reference(chosen) - reference(rejected))
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(h: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta h) (Rafailov et al. 2023, eq. 7).

    smoothing: the share of pairs whose preference is taken to be the wrong way round (Mitchell 2023, "conservative DPO", eq. 3).
    """
    return -(1 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h)


def ipo(h: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17)."""
    return (h - 1 / (2 * beta)).square()


def hinge(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h) (Zhao et al. 2023, "SLiC-HF", eq. 1, on rewards; Liu et al. 2024, "RSO", eq. 8)."""
    return torch.relu(1 - beta * h)


def simpo(difference: Tensor, beta: float, margin: float) -> Tensor:
    """-log sigmoid(beta (policy(chosen) - policy(rejected)) - margin), without a reference (Meng et al. 2024, eq. 6)."""
    return -logsigmoid(beta * difference - margin)


def wins(margin: Tensor) -> Tensor:
    """1 where the chosen answer is preferred, 0 where the rejected one is, one half where they tie."""
    return 0.5 + 0.5 * margin.sign()
