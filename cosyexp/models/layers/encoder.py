"""The pre-norm encoder stack that the v1 and v2 families share: text encoder, speech-token LM, flow encoder.

B batch, T positions, D width, I input width, L layers, H heads, K width of a head.
"""

import math

import torch
from torch import Tensor, nn

from cosyexp.models.layers.attention import RelativeAttention, distance_table


def valid_mask(lengths_B: Tensor, size: int) -> Tensor:
    """(B, size) bool, True on the first `lengths` positions of each row."""
    return torch.arange(size, device=lengths_B.device) < lengths_B.unsqueeze(1)


def chunk_mask(queries: int, keys: int, chunk: int, like: Tensor) -> Tensor:
    """(queries, keys) bool: a query sees its own chunk of `chunk` positions and all before it; `chunk=0` sees everything.

    The queries are the last ones of the keys. `chunk=1` is the causal mask.
    """
    j = torch.arange(keys, device=like.device)
    if chunk == 0:
        return (j >= 0).expand(queries, keys)
    i = j[keys - queries :]
    return j < ((i // chunk + 1) * chunk).unsqueeze(1)


def visible_keys(valid_BT: Tensor, chunk: int = 0, streaming_B: Tensor | None = None) -> Tensor:
    """What each position sees of its row, broadcastable to (B, 1, T, T): all valid ones, a streaming row only up to the end of
    the position's own chunk."""
    visible = valid_BT[:, None, None]
    if streaming_B is not None and chunk > 0:
        chunks = chunk_mask(valid_BT.size(1), valid_BT.size(1), chunk, valid_BT)
        visible = visible & (chunks | ~streaming_B[:, None, None, None])
    return visible


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear."""

    def __init__(self, width: int, hidden: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, with the key names of the original's transformer layer."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(width, heads, attention_dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, nn.ReLU())
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, positions: Tensor, visible: Tensor, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(self.norm1(x_BTD), positions, visible, cache)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.feed_forward(self.norm2(x_BTD))), k, v


class ConformerLayer(nn.Module):
    """The same with SiLU, under the key names of the original's conformer layer (macaron and convolution are off there)."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(width, heads, attention_dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, nn.SiLU())
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, positions: Tensor, visible: Tensor, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(self.norm_mha(x_BTD), positions, visible, cache)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.feed_forward(self.norm_ff(x_BTD))), k, v


class InputEmbedding(nn.Module):
    """Linear, LayerNorm, dropout, optionally ReLU (the original's `linear` and `linear_legacy` input layers)."""

    def __init__(self, in_width: int, width: int, dropout: float, relu: bool) -> None:
        super().__init__()
        layers = [nn.Linear(in_width, width), nn.LayerNorm(width, eps=1e-5), nn.Dropout(dropout)]
        self.out = nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Encoder(nn.Module):
    """A stack of conformer or transformer layers over relative positions.

    in_width, width, heads, hidden (feed-forward), blocks: sizes.
    layer: "conformer" or "transformer"; the latter has a ReLU behind its input embedding.
    chunk: 0 looks at the whole sequence, 1 is causal, n sees whole chunks of n positions and all before.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        heads: int,
        hidden: int,
        blocks: int,
        layer: str = "conformer",
        chunk: int = 0,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kind = {"conformer": ConformerLayer, "transformer": TransformerLayer}[layer]
        self.in_width = in_width
        self.width = width
        self.heads = heads
        self.blocks = blocks
        self.chunk = chunk
        self.embed = InputEmbedding(in_width, width, dropout, relu=layer == "transformer")
        self.after_norm = nn.LayerNorm(width, eps=1e-5)
        self.encoders = nn.ModuleList(
            kind(width, heads, hidden, dropout, attention_dropout) for _ in range(blocks)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTI: Tensor, lengths_B: Tensor) -> Tensor:
        """Encodes padded rows; returns (B, T, D). Positions behind a row's length hold nothing meaningful."""
        x = self._embed(x_BTI)
        positions, visible = self._context(x, x.size(1))
        visible = visible & valid_mask(lengths_B, x.size(1))[:, None, None]
        for layer in self.encoders:
            x = layer(x, positions, visible)[0]
        return self.after_norm(x)

    def empty_cache(self, x: Tensor) -> Tensor:
        """A cache with nothing in it, (L, B, H, 0, 2K), for a batch like `x`."""
        return x.new_zeros(self.blocks, x.size(0), self.heads, 0, 2 * (self.width // self.heads))

    def extend(
        self, x_BTI: Tensor, cache_LBHSK: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encodes positions that follow a cached prefix, without padding; returns (B, T, D) and the grown cache.

        seen: what each position sees, instead of what its chunk says; broadcastable to (B, T, S + T).
        """
        x = self._embed(x_BTI)
        positions, visible = self._context(x, cache_LBHSK.size(3) + x.size(1))
        if seen is not None:
            visible = seen.unsqueeze(1)
        caches: list[Tensor] = []
        for i, layer in enumerate(self.encoders):
            x, k, v = layer(x, positions, visible, cache_LBHSK[i])
            caches.append(torch.cat([k, v], dim=-1))
        return self.after_norm(x), torch.stack(caches)

    def _embed(self, x: Tensor) -> Tensor:
        return self.dropout(self.embed(x) * math.sqrt(self.width))

    def _context(self, x_BTD: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """The distance table from the last T of `keys` positions to all of them, and what each of them sees."""
        queries = x_BTD.size(1)
        nearest = 0 if self.chunk == 1 else 1 - queries
        positions = self.dropout(distance_table(keys - 1, nearest, self.width, x_BTD))
        return positions, chunk_mask(queries, keys, self.chunk, x_BTD)
