"""Pre-norm encoder layers of the v1 and v2 families: text encoder, speech-token LM, flow encoder.

B batch, T positions, D width, I input width, L layers, H heads, K head width, S cached positions.
"""

import math

import torch
from torch import Tensor, nn

from cosyexp.arguments import Count, Fraction
from cosyexp.models.layers.attention import RelativeAttention, distance_table
from cosyexp.registry import register


def valid_mask(lengths_B: Tensor, size: int) -> Tensor:
    """Returns a boolean mask (B, size), True on the first `lengths` positions of each row."""
    return torch.arange(size, device=lengths_B.device) < lengths_B.unsqueeze(1)


def chunk_mask(queries: int, keys: int, chunk: int, like: Tensor) -> Tensor:
    """Returns the boolean attention mask of a sequence that is processed in chunks.

    A query sees its own chunk and everything before it.

    Args:
        queries: Number of queries; they are the last ones of the keys.
        keys: Number of keys.
        chunk: Chunk size in positions. 1 gives the causal mask; with 0, every query sees all keys.
        like: A tensor on the device of the mask.

    Returns:
        The mask, (queries, keys), True where a query may attend.
    """
    j = torch.arange(keys, device=like.device)
    if chunk == 0:
        return (j >= 0).expand(queries, keys)
    i = j[keys - queries :]
    return j < ((i // chunk + 1) * chunk).unsqueeze(1)


def visible_keys(
    valid_BT: Tensor, chunk: int = 0, streaming_B: Tensor | None = None, past: int = 0
) -> Tensor:
    """Returns the attention mask of padded rows, some of which may be streaming.

    Args:
        valid_BT: Boolean, True on positions that are not padding.
        chunk: Chunk size of streaming rows, in positions; with 0, they see as much as the others.
        streaming_B: Boolean, True for rows whose positions see no further than the end of their
            own chunk; None if no row is streaming.
        past: S, the number of keys before these positions, all of them valid.

    Returns:
        A boolean mask that broadcasts to (B, 1, T, S + T), True where a query may attend.
    """
    queries = valid_BT.size(1)
    if past > 0:
        valid_BT = torch.cat([valid_BT.new_ones(valid_BT.size(0), past), valid_BT], dim=1)
    visible = valid_BT[:, None, None]
    if streaming_B is not None and chunk > 0:
        chunks = chunk_mask(queries, queries + past, chunk, valid_BT)
        visible = visible & (chunks | ~streaming_B[:, None, None, None])
    return visible


class FeedForward(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3).

    Args:
        width: Number of input and output channels.
        hidden: Number of hidden channels.
        dropout: Dropout probability after the activation.
        activation: The activation.
    """

    def __init__(self, width: int, hidden: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the network to the last dimension."""
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer with ReLU, `TransformerEncoderLayer` of the original CosyVoice.

    Args:
        width: D.
        heads: H.
        hidden: Hidden channels of the feed-forward network.
        dropout: Dropout probability of the residual branches.
        attention_dropout: Dropout probability of the attention weights.
    """

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
        """Returns the output (B, T, D), and all keys and values; see `RelativeAttention`."""
        attended, k, v = self.self_attn(self.norm1(x_BTD), positions, visible, cache)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.feed_forward(self.norm2(x_BTD))), k, v


class ConformerLayer(nn.Module):
    """Pre-norm conformer layer with SiLU, `ConformerEncoderLayer` of the original CosyVoice.

    Of the Conformer (Gulati et al. 2020), CosyVoice uses neither the convolution module nor the
    macaron feed-forward, so only the activation and the parameter names differ from
    `TransformerLayer`, whose arguments it shares.
    """

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
        """Returns the output (B, T, D), and all keys and values; see `RelativeAttention`."""
        attended, k, v = self.self_attn(self.norm_mha(x_BTD), positions, visible, cache)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.feed_forward(self.norm_ff(x_BTD))), k, v


class InputEmbedding(nn.Module):
    """Linear layer, layer norm and dropout in front of an encoder.

    Mirrors the input layers `linear` and, with ReLU, `linear_legacy` of the original CosyVoice.

    Args:
        in_width: Number of input channels.
        width: Number of output channels.
        dropout: Dropout probability.
        relu: Whether a ReLU follows.
    """

    def __init__(self, in_width: int, width: int, dropout: float, relu: bool) -> None:
        super().__init__()
        layers = [nn.Linear(in_width, width), nn.LayerNorm(width, eps=1e-5), nn.Dropout(dropout)]
        self.out = nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds the last dimension."""
        return self.out(x)


@register("module")
class Encoder(nn.Module):
    """A stack of conformer or transformer layers with relative positions.

    Mirrors `ConformerEncoder` and `TransformerEncoder` of the original CosyVoice
    (Gulati et al. 2020, "Conformer"; Dai et al. 2019, "Transformer-XL").

    Args:
        in_width: I, the number of input channels.
        width: D.
        heads: H; must divide `width`.
        hidden: Hidden channels of the feed-forward networks.
        blocks: L, the number of layers.
        layer: "conformer" or "transformer"; the latter also has a ReLU after its input embedding.
        chunk: What a position sees: 0 is the whole sequence, 1 is causal, and n is its own chunk
            of n positions and everything before it.
        dropout: Dropout probability of embeddings, positions and residual branches.
        attention_dropout: Dropout probability of the attention weights.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        heads: int,
        hidden: int,
        blocks: int,
        layer: str = "conformer",
        chunk: Count = 0,
        dropout: Fraction = 0.1,
        attention_dropout: Fraction = 0.0,
    ) -> None:
        super().__init__()
        layer_class = {"conformer": ConformerLayer, "transformer": TransformerLayer}[layer]
        self.in_width = in_width
        self.width = width
        self.heads = heads
        self.blocks = blocks
        self.chunk = chunk
        self.embed = InputEmbedding(in_width, width, dropout, relu=layer == "transformer")
        self.after_norm = nn.LayerNorm(width, eps=1e-5)
        self.encoders = nn.ModuleList(
            layer_class(width, heads, hidden, dropout, attention_dropout) for _ in range(blocks)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTI: Tensor, lengths_B: Tensor) -> Tensor:
        """Encodes padded rows.

        Args:
            x_BTI: The input.
            lengths_B: Number of valid positions of each row.

        Returns:
            The encoded rows, (B, T, D); undefined on padding.
        """
        x = self._embed(x_BTI)
        positions, visible = self._context(x, x.size(1))
        visible = visible & valid_mask(lengths_B, x.size(1))[:, None, None]
        for layer in self.encoders:
            x = layer(x, positions, visible)[0]
        return self.after_norm(x)

    def empty_cache(self, x: Tensor) -> Tensor:
        """Returns an empty cache, (L, B, H, 0, 2K), with the batch size and dtype of `x`."""
        return x.new_zeros(self.blocks, x.size(0), self.heads, 0, 2 * (self.width // self.heads))

    def extend(
        self, x_BTI: Tensor, cache_LBHSK: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encodes positions that follow a cached prefix; no row may be padded.

        Args:
            x_BTI: The new positions.
            cache_LBHSK: Keys and values of the prefix, (L, B, H, S, 2K).
            seen: Boolean attention mask that broadcasts to (B, T, S + T), True where a position
                may attend; None for the mask that `chunk` defines.

        Returns:
            The encoded positions (B, T, D), and the cache extended by them, (L, B, H, S + T, 2K).
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
        """Returns the distance table and the mask for the last T of `keys` positions."""
        queries = x_BTD.size(1)
        nearest = 0 if self.chunk == 1 else 1 - queries
        positions = self.dropout(distance_table(keys - 1, nearest, self.width, x_BTD))
        return positions, chunk_mask(queries, keys, self.chunk, x_BTD)
