"""The parts of a speech-token LM that are exported: together they decode with a cache.

B batch, L text tokens, E speaker embedding, V speech classes, S cached positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosyexp.models.llm.transformer_lm import TransformerLM

if TYPE_CHECKING:  # transformers takes a second to import
    from cosyexp.models.llm.qwen_lm import QwenLM

TRACED = {"onnx": ("fp32", "fp16", "int8"), "pt2": ("fp32",)}  # TorchScript cannot read Qwen2


class Prefill(nn.Module):
    """Text and speaker to the log-probabilities of the first speech token, and the cache behind them."""

    inputs: tuple[str, ...] = ("text", "speaker")
    outputs = ("logp", "cache")
    dynamic = {
        "text": {0: "B", 1: "L"},
        "speaker": {0: "B"},
        "logp": {0: "B"},
        "cache": {1: "B", 3: "S"},
    }

    def __init__(self, network: TransformerLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor, speaker_BE: Tensor) -> tuple[Tensor, Tensor]:
        x = self.network.prompt(text_BL, speaker_BE)
        return self.network.decode(x, self.network.empty_cache(x))

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        speaker = torch.randn(
            batch, self.network.spk_embed_affine_layer.in_features, generator=draw
        )
        return torch.randint(
            self.network.text_embedding.num_embeddings, (batch, size), generator=draw
        ), speaker


class TextPrefill(nn.Module):
    """Text to the log-probabilities of the first speech token, and the cache behind them."""

    inputs: tuple[str, ...] = ("text",)
    outputs = ("logp", "cache")
    dynamic = {"text": {0: "B", 1: "L"}, "logp": {0: "B"}, "cache": {1: "B", 3: "S"}}
    formats = TRACED

    def __init__(self, network: "QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor) -> tuple[Tensor, Tensor]:
        x = self.network.prompt(text_BL)
        return self.network.decode(x, self.network.empty_cache(x))

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        return (
            torch.randint(
                self.network.text_embedding.num_embeddings, (batch, size), generator=draw
            ),
        )


class Decode(nn.Module):
    """One speech token and the cache to the log-probabilities of the next one, and the grown cache."""

    inputs = ("token", "cache")
    outputs = ("logp", "new_cache")
    dynamic = {
        "token": {0: "B"},
        "cache": {1: "B", 3: "S"},
        "logp": {0: "B"},
        "new_cache": {1: "B", 3: "S_plus_1"},
    }

    def __init__(self, network: "TransformerLM | QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(self, token_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.decode(self.network.speech_embedding(token_B).unsqueeze(1), cache)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        layers, _, heads, _, width = self.network.empty_cache(torch.empty(1)).shape
        cache = torch.randn(layers, batch, heads, size, width, generator=draw)
        return torch.randint(
            self.network.speech_embedding.num_embeddings, (batch,), generator=draw
        ), cache


class TextDecode(Decode):
    """The same for a Qwen2."""

    formats = TRACED
