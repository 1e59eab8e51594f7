"""The parts of a speech-token LM that are exported: together they decode with a cache.

B batch, L text tokens, E speaker embedding, V speech classes, S cached positions.
"""

import torch
from torch import Tensor, nn

from cosyexp.models.llm.transformer_lm import TransformerLM


class Prefill(nn.Module):
    """Text and speaker to the log-probabilities of the first speech token, and the cache behind them."""

    inputs = ("text", "speaker")
    outputs = ("logp", "cache")
    dynamic = {"text": {1: "L"}, "cache": {3: "S"}}

    def __init__(self, network: TransformerLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor, speaker_BE: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.full((text_BL.size(0),), text_BL.size(1), device=text_BL.device)
        x = self.network.prefix(text_BL, lengths, speaker_BE)
        return self.network.decode(x, self.network.llm.empty_cache(x))

    def example(self, size: int, draw: torch.Generator) -> tuple[Tensor, ...]:
        texts = self.network.text_embedding.num_embeddings
        speaker = torch.randn(1, self.network.spk_embed_affine_layer.in_features, generator=draw)
        return torch.randint(texts, (1, size), generator=draw), speaker


class Decode(nn.Module):
    """One speech token and the cache to the log-probabilities of the next one, and the grown cache."""

    inputs = ("token", "cache")
    outputs = ("logp", "new_cache")
    dynamic = {"cache": {3: "S"}, "new_cache": {3: "S_plus_1"}}

    def __init__(self, network: TransformerLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.decode(self.network.speech_embedding(token_B).unsqueeze(1), cache)

    def example(self, size: int, draw: torch.Generator) -> tuple[Tensor, ...]:
        llm = self.network.llm
        cache = torch.randn(llm.blocks, 1, llm.heads, size, 2 * (llm.width // llm.heads), generator=draw)
        return torch.randint(self.network.end_of_speech, (1,), generator=draw), cache
