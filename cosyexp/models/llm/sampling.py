"""How the next speech token is chosen from its log-probabilities. V classes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Draw = Callable[[Tensor], int]  # an index, from weights that need not add up to one


def drawn_from(generator: torch.Generator) -> Draw:
    return lambda weights: int(torch.multinomial(weights, 1, generator=generator))


def greedy(logp_V: Tensor, history: Sequence[int], draw: Draw) -> int:
    """The most likely token."""
    return int(logp_V.argmax())


def nucleus(
    logp_V: Tensor, history: Sequence[int], draw: Draw, *, top_p: float = 0.8, top_k: int = 25
) -> int:
    """One of the likeliest tokens, at most `top_k` of them, up to the one that fills `top_p` (Holtzman et al. 2020)."""
    probabilities, tokens = logp_V.softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = (before < top_p) & (torch.arange(len(tokens)) < top_k)
    return int(tokens[draw(probabilities[kept])])


def ras(
    logp_V: Tensor,
    history: Sequence[int],
    draw: Draw,
    *,
    top_p: float = 0.8,
    top_k: int = 25,
    window: int = 10,
    repetition: float = 0.1,
) -> int:
    """Repetition-aware sampling (Chen et al. 2024, "VALL-E 2", section 3.2).

    A nucleus token that makes up at least `repetition` of the last `window` tokens is drawn again, from all the others.
    """
    token = nucleus(logp_V, history, draw, top_p=top_p, top_k=top_k)
    if list(history[-window:]).count(token) >= window * repetition:
        others = logp_V.clone()
        others[token] = -torch.inf
        token = draw(others.softmax(0))
    return token
