"""Sequences of embeddings: indexing, and prompts of different lengths in one batch.

B batch, L text tokens, N speech tokens, T positions, S selected positions, D width, K keys.
"""

import torch
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


def prompt_index(
    text_lens_B: Tensor, speech_lens_B: Tensor, text: int, speech: int, speaker: bool
) -> tuple[Tensor, Tensor]:
    """Arranges prompts as [sos, (speaker), text, task, speech], aligned at their ends.

    Args:
        text_lens_B: Number of text tokens of each row.
        speech_lens_B: Number of speech tokens of each row.
        text: L.
        speech: N.
        speaker: Whether the sequence has a speaker embedding.

    Returns:
        The index in [text_1..L, speech_1..N, sos, task, speaker] of the embedding at each position,
        (B, T), and the number of positions before the start of each row, (B,).
    """
    sos, task, before_text = text + speech, text + speech + 1, 1 + int(speaker)
    start_B = text + speech - text_lens_B - speech_lens_B
    places = torch.arange(text + speech + before_text + 1, device=text_lens_B.device)
    place_BT = places - start_B.unsqueeze(1) - before_text
    spoken_BT = place_BT - text_lens_B.unsqueeze(1) - 1
    index_BT = torch.where(spoken_BT < 0, place_BT, text + spoken_BT)
    index_BT = torch.where(spoken_BT == -1, task, index_BT)
    if speaker:
        index_BT = torch.where(place_BT == -1, sos + 2, index_BT)
        return torch.where(place_BT < -1, sos, index_BT), start_B
    return torch.where(place_BT < 0, sos, index_BT), start_B


def seen_keys(start_B: Tensor, queries: int, keys: int) -> Tensor:
    """Returns the attention mask of causal rows that are aligned at their ends.

    Args:
        start_B: Number of positions before the start of each row.
        queries: T; they are the last ones of the keys.
        keys: K.

    Returns:
        The mask, (B, T, K), True where a query may attend. A query before the start of its row
        sees itself alone, so that no softmax is empty.
    """
    j = torch.arange(keys, device=start_B.device)
    i = j[keys - queries :].unsqueeze(1)
    return (j == i) | ((j < i) & (j >= start_B[:, None, None]))
