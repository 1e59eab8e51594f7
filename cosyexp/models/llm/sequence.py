"""Indexing into sequences of embeddings. B batch, T positions, S selected positions, D width."""

from torch import Tensor


def take(x_BTD: Tensor, places_BS: Tensor) -> Tensor:
    """Gathers the embeddings at the given positions of each row.

    Args:
        x_BTD: The sequences.
        places_BS: Positions to select, in [0, T).

    Returns:
        The selected embeddings, (B, S, D).
    """
    return x_BTD.gather(1, places_BS.unsqueeze(2).expand(-1, -1, x_BTD.size(2)))
