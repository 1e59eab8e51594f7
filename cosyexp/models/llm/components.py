"""Components of a speech-token LM that are exported: prefill, and decoding with a cache.

The rows of a batch may have different lengths: they are aligned at their ends, and `start` is the
number of positions before the start of each row. Class attributes follow the protocol `Component`
in `cosyexp/exporting/components.py`.

B batch, L text tokens, N speech tokens, E speaker embedding, V speech classes, S cached positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosyexp.models.llm.transformer_lm import TransformerLM
from cosyexp.registry import register

if TYPE_CHECKING:  # importing transformers takes a second
    from cosyexp.models.llm.qwen_lm import QwenLM

EXCLUDED = {"jit": "TorchScript cannot compile Qwen2"}
PROMPT = ("text", "text_lens", "speech", "speech_lens")
DYNAMIC = {
    "text": {0: "batch", 1: "text_len"},
    "text_lens": {0: "batch"},
    "speech": {0: "batch", 1: "speech_len"},
    "speech_lens": {0: "batch"},
    "logp": {0: "batch"},
    "cache": {1: "batch", 3: "past_len"},
    "start": {0: "batch"},
}


def prompts(
    network: "TransformerLM | QwenLM", size: int, draw: torch.Generator, batch: int
) -> list[Tensor]:
    """Returns random prompts: `size` text and speech tokens in the first row, fewer in others."""
    text = network.text_embedding.num_embeddings
    speech = network.speech_embedding.num_embeddings
    lens = size - torch.arange(batch) * (size // 3)
    return [
        torch.randint(text, (batch, size), generator=draw),
        lens,
        torch.randint(speech, (batch, size), generator=draw),
        lens.flip(0),
    ]


@register("component")
class Prefill(nn.Module):
    """Runs the prompt of a v1 LM and predicts the first speech token.

    Args:
        network: The `TransformerLM` (Du et al. 2024, "CosyVoice").
    """

    inputs: tuple[str, ...] = (*PROMPT, "speaker")
    outputs = ("logp", "cache", "start")
    dynamic = {**DYNAMIC, "speaker": {0: "batch"}}

    def __init__(self, network: TransformerLM) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        text_BL: Tensor,
        text_lens_B: Tensor,
        speech_BN: Tensor,
        speech_lens_B: Tensor,
        speaker_BE: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the prompts; see `TransformerLM.aligned_prompts` for the arguments.

        Returns:
            The log-probabilities (B, V) of the first speech token, the cache, and the number of
            positions before the start of each row (B,).
        """
        x, start_B = self.network.aligned_prompts(
            text_BL, text_lens_B, speech_BN, speech_lens_B, speaker_BE
        )
        logp_BV, cache = self.network.decode(x, self.network.empty_cache(x), start_B)
        return logp_BV, cache, start_B

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `size` text and speech tokens, fewer in all rows but the first."""
        speaker_dim = self.network.spk_embed_affine_layer.in_features
        speaker = torch.randn(batch, speaker_dim, generator=draw)
        return *prompts(self.network, size, draw, batch), speaker


@register("component")
class TextPrefill(nn.Module):
    """Runs the prompt of a v2 or v3 LM, which has no speaker, and predicts the first speech token.

    Args:
        network: The `QwenLM` (Du et al. 2024, "CosyVoice 2"; Du et al. 2025, "CosyVoice 3").
    """

    inputs: tuple[str, ...] = PROMPT
    outputs = ("logp", "cache", "start")
    dynamic = DYNAMIC
    excluded_formats = EXCLUDED

    def __init__(self, network: "QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(
        self, text_BL: Tensor, text_lens_B: Tensor, speech_BN: Tensor, speech_lens_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the prompts; see `Prefill.forward`, and `QwenLM.aligned_prompts`."""
        x, start_B = self.network.aligned_prompts(text_BL, text_lens_B, speech_BN, speech_lens_B)
        logp_BV, cache = self.network.decode(x, self.network.empty_cache(x), start_B)
        return logp_BV, cache, start_B

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `size` text and speech tokens, fewer in all rows but the first."""
        return tuple(prompts(self.network, size, draw, batch))


@register("component")
class Decode(nn.Module):
    """One step of decoding with a v1 LM (Du et al. 2024, "CosyVoice").

    Args:
        network: The language model.
    """

    inputs = ("token", "cache", "start")
    outputs = ("logp", "new_cache")
    dynamic = {
        "token": {0: "batch"},
        "cache": {1: "batch", 3: "past_len"},
        "start": {0: "batch"},
        "logp": {0: "batch"},
        "new_cache": {1: "batch", 3: "past_len + 1"},
    }

    def __init__(self, network: "TransformerLM | QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(self, token_B: Tensor, cache: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a speech token to the sequence.

        Args:
            token_B: The last speech token of each row.
            cache: The cache of everything before it.
            start_B: Number of positions before the start of each row.

        Returns:
            The log-probabilities (B, V) of the next speech token, and the cache with S + 1
            positions.
        """
        x_B1D = self.network.speech_embedding(token_B).unsqueeze(1)
        return self.network.decode(x_B1D, cache, start_B)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: a speech token and a cache of `size` positions for each row."""
        layers, _, heads, _, width = self.network.empty_cache(torch.empty(1)).shape
        cache = torch.randn(layers, batch, heads, size, width, generator=draw)
        classes = self.network.speech_embedding.num_embeddings
        start = torch.arange(batch) * (size // 2)
        return torch.randint(classes, (batch,), generator=draw), cache, start


@register("component")
class TextDecode(Decode):
    """One step of decoding with a v2 or v3 LM (Du et al. 2024, "CosyVoice 2")."""

    excluded_formats = EXCLUDED
