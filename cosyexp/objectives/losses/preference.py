"""Losses of preference pairs, computed from the log-probabilities of their answers.

Every tensor has the shape (P,), one value for each pair. `h` is how much more the policy prefers
the chosen answer than the reference does:

    h = (policy(chosen) - policy(rejected)) - (reference(chosen) - reference(rejected))

where policy(y) and reference(y) are the log-probabilities of an answer y.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(h: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Computes -log sigmoid(beta h) (Rafailov et al. 2023, "DPO", eq. 7).

    Args:
        h: how much more the policy prefers the chosen answer than the reference does.
        beta: scale of the rewards.
        smoothing: the assumed share of pairs whose preference is the wrong way round (Mitchell
            2023, "conservative DPO", eq. 3).
    """
    return -(1 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h)


def ipo(h: Tensor, beta: float) -> Tensor:
    """Computes (h - 1 / (2 beta))^2 (Azar et al. 2023, "IPO", eq. 17)."""
    return (h - 1 / (2 * beta)).square()


def hinge(h: Tensor, beta: float) -> Tensor:
    """Computes max(0, 1 - beta h) (Liu et al. 2024, "RSO", eq. 8).

    It is the loss of Zhao et al. (2023, "SLiC-HF", eq. 1), applied to rewards.
    """
    return torch.relu(1 - beta * h)


def simpo(difference: Tensor, beta: float, margin: float) -> Tensor:
    """Computes -log sigmoid(beta difference - margin) (Meng et al. 2024, "SimPO", eq. 6).

    Args:
        difference: policy(chosen) - policy(rejected); there is no reference.
        beta: scale of the rewards.
        margin: the margin by which the chosen answer should win.
    """
    return -logsigmoid(beta * difference - margin)


def wins(margin: Tensor) -> Tensor:
    """Returns 1 where the chosen answer is preferred, 0 where the rejected one is, 0.5 at a tie.

    Args:
        margin: how much higher the reward of the chosen answer is.
    """
    return 0.5 + 0.5 * margin.sign()
