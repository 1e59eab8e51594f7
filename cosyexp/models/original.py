"""The encoders under the signatures by which the original's runtime calls their TorchScript files, in place of its own modules.

B batch, T positions, I input width, D width, C positions of look-ahead, L layers, H heads, S cached positions, K width of a head.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import valid_mask

if TYPE_CHECKING:  # TorchScript reads annotations, and knows no such types
    from cosyexp.models.flow.upsampling import UpsamplingEncoder
    from cosyexp.models.layers.encoder import Encoder

IN_ANY_HALF = {"jit": ("fp32", "fp16")}


class OriginalEncoder(nn.Module):
    """A v1 encoder: rows and their lengths to (B, T, D) and their mask (B, 1, T). Its chunks are its own, whatever the sizes asked for.

    part: the encoder's name in the network.
    """

    inputs = ("xs", "xs_lens")
    outputs = ("out", "masks")
    dynamic = {
        "xs": {0: "B", 1: "T"},
        "xs_lens": {0: "B"},
        "out": {0: "B", 1: "T"},
        "masks": {0: "B", 2: "T"},
    }
    formats = IN_ANY_HALF

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
        return self.encoder(xs, xs_lens), valid_mask(xs_lens, xs.size(1)).unsqueeze(1)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        return torch.randn(batch, size, self.encoder.in_width, generator=draw), torch.full(
            (batch,), size
        )


class OriginalDecoder(OriginalEncoder):
    """The same with the step that decodes: positions (1, T, I) behind a cache (L, H, S, 2K)."""

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
        """Returns (1, T, D), the cache of the last `required_cache_size` positions (all if negative), and `cnn_cache` as it came.

        att_mask: (1, T, T or S + T) bool, what is seen; empty: as the encoder's chunks say. offset: without effect, as positions
        are relative.
        """
        cache = att_cache.unsqueeze(1) if att_cache.numel() > 0 else self.encoder.empty_cache(xs)
        out, cache = self.encoder.extend(xs, cache, att_mask if att_mask.numel() > 0 else None)
        kept = cache.size(3) if required_cache_size < 0 else min(required_cache_size, cache.size(3))
        return out, cache[:, 0, :, cache.size(3) - kept :], cnn_cache


class OriginalUpsampler(nn.Module):
    """The v2 flow encoder: rows of tokens and their lengths to frames (B, T, D) and their mask (B, 1, T).

    context: tokens that are only looked at ahead, (B, C, I). streaming: every position sees the future by chunks.
    """

    inputs = ("xs", "xs_lens")
    outputs = ("out", "masks")
    dynamic = {
        "xs": {0: "B", 1: "N"},
        "xs_lens": {0: "B"},
        "out": {0: "B", 1: "T"},
        "masks": {0: "B", 2: "T"},
    }
    formats = IN_ANY_HALF

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
        frames, frames_B = xs.size(1) * self.encoder.factor, xs_lens * self.encoder.factor
        chunked = torch.full((xs.size(0),), streaming, dtype=torch.bool, device=xs.device)
        if context.size(1) > 0:
            xs, xs_lens = torch.cat([xs, context], dim=1), xs_lens + context.size(1)
        return self.encoder(xs, xs_lens, frames, frames_B, chunked), valid_mask(
            frames_B, frames
        ).unsqueeze(1)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        return torch.randn(batch, size, self.encoder.width, generator=draw), torch.full(
            (batch,), size
        )
