"""Sampling of the next speech token from its log-probabilities. V speech classes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cosyexp.arguments import Count, Share
from cosyexp.registry import register

# Draws an index from non-negative weights, which need not add up to one.
Draw = Callable[[Tensor], int]


def drawn_from(generator: torch.Generator) -> Draw:
    """Returns a function that draws indices by weight with a random generator."""
    return lambda weights: int(torch.multinomial(weights, 1, generator=generator))


@register("token_sampler")
def greedy(logp_V: Tensor, history: Sequence[int], draw: Draw) -> int:
    """Returns the most likely token; `history` and `draw` are not used."""
    return int(logp_V.argmax())


@register("token_sampler")
def nucleus(
    logp_V: Tensor, history: Sequence[int], draw: Draw, *, top_p: float = 0.8, top_k: int = 25
) -> int:
    """Samples from the most likely tokens (top-p sampling, Holtzman et al. 2020).

    Args:
        logp_V: Log-probabilities, or unnormalized scores.
        history: Not used.
        draw: Draws an index by weight.
        top_p: Tokens are candidates until their total probability reaches this; the token that
            reaches it is one of them.
        top_k: Maximum number of candidates.

    Returns:
        The sampled token.
    """
    weights, tokens = _candidates(logp_V, top_p, top_k)
    return int(tokens[draw(weights)])


@register("token_sampler")
def ras(
    logp_V: Tensor,
    history: Sequence[int],
    draw: Draw,
    *,
    top_p: Share = 0.8,
    top_k: int = 25,
    window: Count = 10,
    repetition: Share = 0.1,
) -> int:
    """Repetition-aware sampling (Chen et al. 2024, "VALL-E 2", section 3.2).

    Samples a token by `nucleus`. If it is too frequent among the last tokens, another one is
    sampled from all tokens but this one.

    Args:
        logp_V: Log-probabilities, or unnormalized scores.
        history: The tokens so far.
        draw: Draws an index by weight.
        top_p: See `nucleus`.
        top_k: See `nucleus`.
        window: How many of the last tokens are searched for repetitions.
        repetition: The share of `window` from which on a token counts as too frequent.

    Returns:
        The sampled token.
    """
    token = nucleus(logp_V, history, draw, top_p=top_p, top_k=top_k)
    if list(history[-window:]).count(token) >= window * repetition:
        others = logp_V.clone()
        others[token] = -torch.inf
        token = draw(others.softmax(0))
    return token


def ras_logits(
    logp_V: Tensor,
    history: Sequence[int],
    *,
    top_p: float = 0.8,
    top_k: int = 25,
    window: int = 10,
    repetition: float = 0.1,
) -> Tensor:
    """Returns the logarithms of the probabilities with which `ras` chooses each token.

    For a runtime that draws from logits alone. What is too frequent among the last tokens gives its
    probability of being drawn first to all others, in proportion to theirs.

    Args:
        logp_V: Log-probabilities, or unnormalized scores.
        history: The tokens so far.
        top_p: As for the other arguments, see `ras`.
        top_k: See `ras`.
        window: See `ras`.
        repetition: See `ras`.
    """
    p_V = logp_V.double().softmax(0)
    weights, tokens = _candidates(logp_V.double(), top_p, top_k)
    first_V = torch.zeros_like(p_V).index_copy(0, tokens, weights / weights.sum())
    chosen_V, last = first_V.clone(), list(history[-window:])
    frequent = [token for token in set(last) if last.count(token) >= window * repetition]
    chosen_V[frequent] = 0
    for token in frequent:
        others_V = p_V.clone()
        others_V[token] = 0
        chosen_V += first_V[token] * others_V / others_V.sum()
    return chosen_V.log()


def _candidates(logp_V: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns the probabilities and the indices of the tokens that `nucleus` samples from."""
    probabilities, tokens = logp_V.softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = (before < top_p) & (torch.arange(len(tokens), device=tokens.device) < top_k)
    return probabilities[kept], tokens[kept]
