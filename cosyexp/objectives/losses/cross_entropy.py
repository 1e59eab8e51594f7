"""Cross-entropy of token classes.

X stands for any number of leading dimensions, such as (B, T). V classes.
"""

import math

import torch
from torch import Tensor


def token_loss(
    logits_XV: Tensor, targets_X: Tensor, valid_X: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Sums KL(p || softmax(logits)) over the valid positions; without smoothing, the cross-entropy.

    p is 1 - smoothing at the target; the rest is spread evenly over the other classes (Szegedy et
    al. 2016, "Rethinking the Inception Architecture", section 7).

    Args:
        logits_XV: the logits.
        targets_X: the target classes; at invalid positions any class of the vocabulary.
        valid_X: the mask, True at valid positions.
        smoothing: share of the probability that is moved from the target to the other classes.
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
    """Counts the valid positions whose most likely class is the target."""
    return ((logits_XV.argmax(-1) == targets_X) & valid_X).sum()


def log_probabilities(logits_XV: Tensor) -> Tensor:
    """Returns the log-softmax of logits, computed in fp32, or in fp64 if the logits are fp64."""
    return torch.log_softmax(
        logits_XV.float() if logits_XV.dtype != torch.float64 else logits_XV, dim=-1
    )


def at(logp_XV: Tensor, targets_X: Tensor) -> Tensor:
    """Returns the log-probability of each target, in the shape of the targets."""
    return logp_XV.gather(-1, targets_X.unsqueeze(-1)).squeeze(-1)
