"""Components of a speech-token LM that are exported: prefill, and decoding with a cache.

Class attributes follow the protocol `Component` in `cosyexp/exporting/components.py`.

B batch, L text tokens, E speaker embedding, V speech classes, S cached positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosyexp.models.llm.transformer_lm import TransformerLM
from cosyexp.registry import register

if TYPE_CHECKING:  # importing transformers takes a second
    from cosyexp.models.llm.qwen_lm import QwenLM

EXCLUDED = {"jit": "TorchScript cannot compile Qwen2"}


@register("component")
class Prefill(nn.Module):
    """Runs the prompt of a v1 LM and predicts the first speech token.

    Args:
        network: The `TransformerLM` (Du et al. 2024, "CosyVoice").
    """

    inputs: tuple[str, ...] = ("text", "speaker")
    outputs = ("logp", "cache")
    dynamic = {
        "text": {0: "batch", 1: "text_len"},
        "speaker": {0: "batch"},
        "logp": {0: "batch"},
        "cache": {1: "batch", 3: "past_len"},
    }

    def __init__(self, network: TransformerLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor, speaker_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities (B, V) of the first speech token, and the cache."""
        x = self.network.prompt(text_BL, speaker_BE)
        return self.network.decode(x, self.network.empty_cache(x))

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `size` text tokens and a speaker embedding for each row."""
        speaker_dim = self.network.spk_embed_affine_layer.in_features
        speaker = torch.randn(batch, speaker_dim, generator=draw)
        vocabulary = self.network.text_embedding.num_embeddings
        return torch.randint(vocabulary, (batch, size), generator=draw), speaker


@register("component")
class TextPrefill(nn.Module):
    """Runs the prompt of a v2 or v3 LM, which has no speaker, and predicts the first speech token.

    Args:
        network: The `QwenLM` (Du et al. 2024, "CosyVoice 2"; Du et al. 2025, "CosyVoice 3").
    """

    inputs: tuple[str, ...] = ("text",)
    outputs = ("logp", "cache")
    dynamic = {
        "text": {0: "batch", 1: "text_len"},
        "logp": {0: "batch"},
        "cache": {1: "batch", 3: "past_len"},
    }
    excluded_formats = EXCLUDED

    def __init__(self, network: "QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities (B, V) of the first speech token, and the cache."""
        x = self.network.prompt(text_BL)
        return self.network.decode(x, self.network.empty_cache(x))

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `size` text tokens for each row."""
        vocabulary = self.network.text_embedding.num_embeddings
        return (torch.randint(vocabulary, (batch, size), generator=draw),)


@register("component")
class Decode(nn.Module):
    """One step of decoding with a v1 LM (Du et al. 2024, "CosyVoice").

    Args:
        network: The language model.
    """

    inputs = ("token", "cache")
    outputs = ("logp", "new_cache")
    dynamic = {
        "token": {0: "batch"},
        "cache": {1: "batch", 3: "past_len"},
        "logp": {0: "batch"},
        "new_cache": {1: "batch", 3: "past_len + 1"},
    }

    def __init__(self, network: "TransformerLM | QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(self, token_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a speech token to the sequence.

        Args:
            token_B: The last speech token of each row.
            cache: The cache of everything before it.

        Returns:
            The log-probabilities (B, V) of the next speech token, and the cache with S + 1
            positions.
        """
        return self.network.decode(self.network.speech_embedding(token_B).unsqueeze(1), cache)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: a speech token and a cache of `size` positions for each row."""
        layers, _, heads, _, width = self.network.empty_cache(torch.empty(1)).shape
        cache = torch.randn(layers, batch, heads, size, width, generator=draw)
        classes = self.network.speech_embedding.num_embeddings
        return torch.randint(classes, (batch,), generator=draw), cache


@register("component")
class TextDecode(Decode):
    """One step of decoding with a v2 or v3 LM (Du et al. 2024, "CosyVoice 2")."""

    excluded_formats = EXCLUDED
