"""Positions of a sequence. B batch, T positions, S places, D width."""

from torch import Tensor


def take(x_BTD: Tensor, places_BS: Tensor) -> Tensor:
    """(B, S, D): of each row what stands at its places."""
    return x_BTD.gather(1, places_BS.unsqueeze(2).expand(-1, -1, x_BTD.size(2)))
