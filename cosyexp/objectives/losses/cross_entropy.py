"""Cross-entropy of token classes. V classes."""

import math

import torch
from torch import Tensor


def token_loss(
    logits_XV: Tensor, targets_X: Tensor, valid_X: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Sum over the valid positions of KL(p || softmax(logits)); p holds 1 - smoothing at the target, the rest evenly elsewhere.

    (Szegedy et al. 2016, section 7.) Without smoothing it is the cross-entropy. Targets of invalid positions may be anything
    inside the vocabulary.
    """
    logp = log_probabilities(logits_XV)
    at_target = at(logp, targets_X)
    loss = -(1 - smoothing) * at_target
    if smoothing:
        others = logits_XV.size(-1) - 1
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(
            smoothing / others
        )
        loss = loss - smoothing / others * (logp.sum(-1) - at_target) + entropy
    return (loss * valid_X).sum()


def hits(logits_XV: Tensor, targets_X: Tensor, valid_X: Tensor) -> Tensor:
    """The number of valid positions whose most likely class is the target."""
    return ((logits_XV.argmax(-1) == targets_X) & valid_X).sum()


def log_probabilities(logits_XV: Tensor) -> Tensor:
    """In at least fp32."""
    return torch.log_softmax(
        logits_XV.float() if logits_XV.dtype != torch.float64 else logits_XV, dim=-1
    )


def at(logp_XV: Tensor, targets_X: Tensor) -> Tensor:
    """The log-probability of each target."""
    return logp_XV.gather(-1, targets_X.unsqueeze(-1)).squeeze(-1)
