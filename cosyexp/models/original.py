"""Encoders with the call signatures of the TorchScript files of the original CosyVoice runtime.

The runtime loads these files, such as `llm.llm.fp16.zip`, in place of its own modules. Each class
is a component of an export; its class attributes follow the protocol `Component` in
`cosyexp/exporting/components.py`.

B batch, N tokens, T positions or frames, I input width, D width, C look-ahead tokens, L layers,
H heads, S cached positions, K head width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import valid_mask
from cosyexp.registry import register

if TYPE_CHECKING:  # TorchScript evaluates annotations, and cannot compile these types
    from cosyexp.models.flow.upsampling import UpsamplingEncoder
    from cosyexp.models.layers.encoder import Encoder


@register("component")
class OriginalEncoder(nn.Module):
    """A v1 encoder: the text encoder of the llm, or the encoder of the flow.

    Mirrors `BaseEncoder` of the original CosyVoice.

    Args:
        network: The network that contains the encoder.
        part: The name of the encoder in the network.
    """

    inputs = ("xs", "xs_lens")
    outputs = ("out", "masks")
    dynamic = {
        "xs": {0: "B", 1: "T"},
        "xs_lens": {0: "B"},
        "out": {0: "B", 1: "T"},
        "masks": {0: "B", 2: "T"},
    }
    only_formats = ("jit",)
    precisions = {"jit": ("fp32", "fp16")}

    def __init__(self, network: nn.Module, part: str) -> None:
        super().__init__()
        self.encoder: Encoder = getattr(network, part)

    def forward(
        self,
        xs: Tensor,
        xs_lens: Tensor,
        decoding_chunk_size: int = 0,
        num_decoding_left_chunks: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Encodes padded rows.

        Args:
            xs: The input, (B, T, I).
            xs_lens: Number of valid positions of each row, (B,).
            decoding_chunk_size: Ignored; the chunk size of the encoder applies.
            num_decoding_left_chunks: Ignored, as in the original.

        Returns:
            The encoded rows (B, T, D), and the mask of their valid positions (B, 1, T).
        """
        return self.encoder(xs, xs_lens), valid_mask(xs_lens, xs.size(1)).unsqueeze(1)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `batch` rows of `size` positions, without padding."""
        xs = torch.randn(batch, size, self.encoder.in_width, generator=draw)
        return xs, torch.full((batch,), size)


@register("component")
class OriginalDecoder(OriginalEncoder):
    """The transformer of the v1 llm: an `OriginalEncoder` that also decodes step by step.

    `forward_chunk` mirrors the method of `BaseEncoder` of the original CosyVoice.
    """

    methods = ("forward_chunk",)

    @torch.jit.export
    def forward_chunk(
        self,
        xs: Tensor,
        offset: int,
        required_cache_size: int,
        att_cache: Tensor = torch.zeros(0, 0, 0, 0),  # noqa: B008
        cnn_cache: Tensor = torch.zeros(0, 0, 0, 0),  # noqa: B008
        att_mask: Tensor = torch.ones(0, 0, 0, dtype=torch.bool),  # noqa: B008
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes positions that follow a cached prefix.

        Args:
            xs: The new positions, (1, T, I).
            offset: Ignored; positions are relative.
            required_cache_size: How many of the last positions to keep in the cache; all if
                negative.
            att_cache: Keys and values of the prefix, (L, H, S, 2K); empty if there is none.
            cnn_cache: Returned as it is; there are no convolutions.
            att_mask: Boolean mask that broadcasts to (1, T, S + T), True where a position may
                attend; empty for the mask of the encoder.

        Returns:
            The encoded positions (1, T, D), the new cache, and `cnn_cache`.
        """
        cache = att_cache.unsqueeze(1) if att_cache.numel() > 0 else self.encoder.empty_cache(xs)
        out, cache = self.encoder.extend(xs, cache, att_mask if att_mask.numel() > 0 else None)
        kept = cache.size(3) if required_cache_size < 0 else min(required_cache_size, cache.size(3))
        return out, cache[:, 0, :, cache.size(3) - kept :], cnn_cache


@register("component")
class OriginalUpsampler(nn.Module):
    """The v2 flow encoder: speech tokens to hidden mel frames.

    Mirrors `UpsampleConformerEncoder` of the original CosyVoice.

    Args:
        network: The network that contains the encoder.
        part: The name of the encoder in the network.
    """

    inputs = ("xs", "xs_lens")
    outputs = ("out", "masks")
    dynamic = {
        "xs": {0: "B", 1: "N"},
        "xs_lens": {0: "B"},
        "out": {0: "B", 1: "T"},
        "masks": {0: "B", 2: "T"},
    }
    only_formats = ("jit",)
    precisions = {"jit": ("fp32", "fp16")}

    def __init__(self, network: nn.Module, part: str) -> None:
        super().__init__()
        self.encoder: UpsamplingEncoder = getattr(network, part)

    def forward(
        self,
        xs: Tensor,
        xs_lens: Tensor,
        context: Tensor = torch.zeros(0, 0, 0),  # noqa: B008
        decoding_chunk_size: int = 0,
        num_decoding_left_chunks: int = -1,
        streaming: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encodes padded rows of embedded speech tokens.

        Args:
            xs: Embedded tokens, (B, N, I).
            xs_lens: Number of valid tokens of each row, (B,).
            context: Embedded tokens that follow and serve as look-ahead only, (B, C, I); empty at
                the end of an utterance.
            decoding_chunk_size: Ignored; the chunk size of the encoder applies.
            num_decoding_left_chunks: Ignored, as in the original.
            streaming: Whether every position sees no further than the end of its own chunk.

        Returns:
            Hidden frames (B, T, D), and the mask of the valid ones (B, 1, T).
        """
        frames, frames_B = xs.size(1) * self.encoder.factor, xs_lens * self.encoder.factor
        streaming_B = torch.full((xs.size(0),), streaming, dtype=torch.bool, device=xs.device)
        if context.size(1) > 0:
            xs, xs_lens = torch.cat([xs, context], dim=1), xs_lens + context.size(1)
        out = self.encoder(xs, xs_lens, frames, frames_B, streaming_B)
        return out, valid_mask(frames_B, frames).unsqueeze(1)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `batch` rows of `size` tokens, without padding."""
        xs = torch.randn(batch, size, self.encoder.width, generator=draw)
        return xs, torch.full((batch,), size)
