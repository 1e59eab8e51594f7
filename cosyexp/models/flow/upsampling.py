"""The encoder of the v2 flow: speech tokens to hidden mel frames at a fixed ratio.

B batch, N speech tokens, C channels, D width, T mel frames.
"""

import math

from torch import Tensor, nn

from cosyexp.arguments import Count, Fraction
from cosyexp.models.flow.parts import LookAhead, PaddedConv
from cosyexp.models.layers.attention import distance_table
from cosyexp.models.layers.encoder import ConformerLayer, InputEmbedding, valid_mask, visible_keys
from cosyexp.registry import register


class Upsample(nn.Module):
    """Repeats each position and smooths the result with a causal convolution.

    Mirrors `Upsample1D` of the original CosyVoice.

    Args:
        width: D.
        factor: How many times each position is repeated.
    """

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = PaddedConv(width, width, 2 * factor + 1, left=2 * factor)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, factor * T, D)."""
        repeated_BCT = x_BTD.repeat_interleave(self.factor, dim=1).transpose(1, 2)
        return self.conv(repeated_BCT).transpose(1, 2)


@register("module")
class UpsamplingEncoder(nn.Module):
    """The upsampling conformer encoder of CosyVoice 2 (Du et al. 2024, section 2.4).

    Look-ahead, conformer layers over tokens, upsampling, conformer layers over frames. Mirrors
    `UpsampleConformerEncoder` of the original CosyVoice.

    Args:
        width: D.
        heads: Number of attention heads; must divide `width`.
        hidden: Hidden channels of the feed-forward networks.
        blocks: Number of layers over tokens.
        up_blocks: Number of layers over frames.
        factor: Frames per token.
        look_ahead: Number of tokens of look-ahead.
        chunk: Chunk size of streaming rows, in tokens; 0 for none.
        dropout: Dropout probability of embeddings, positions and residual branches.
        attention_dropout: Dropout probability of the attention weights.
        padding: "own" keeps the rows of a batch independent; "original" lets the look-ahead read
            the embeddings of padding, as the original does.

    Raises:
        ValueError: `padding` is unknown.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        blocks: int,
        up_blocks: Count,
        factor: int,
        look_ahead: Count,
        chunk: Count,
        dropout: Fraction = 0.1,
        attention_dropout: Fraction = 0.1,
        padding: str = "own",
    ) -> None:
        super().__init__()
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} must be 'own' or 'original'")

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                ConformerLayer(width, heads, hidden, dropout, attention_dropout)
                for _ in range(count)
            )

        self.width, self.factor, self.chunk = width, factor, chunk
        self.look_ahead = look_ahead
        self.include_padding = padding == "original"
        self.embed = InputEmbedding(width, width, dropout, relu=False)
        self.after_norm = nn.LayerNorm(width, eps=1e-5)
        self.pre_lookahead_layer = LookAhead(width, width, look_ahead)
        self.encoders = layers(blocks)
        self.up_layer = Upsample(width, factor)
        self.up_embed = InputEmbedding(width, width, dropout, relu=False)
        self.up_encoders = layers(up_blocks)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BND: Tensor,
        lengths_B: Tensor,
        frames: int,
        frames_B: Tensor,
        streaming_B: Tensor | None = None,
    ) -> Tensor:
        """Encodes padded rows of embedded tokens.

        Args:
            x_BND: Embedded tokens.
            lengths_B: Number of valid tokens of each row.
            frames: T. Tokens after the first T / factor ones serve as look-ahead only.
            frames_B: Number of valid frames of each row.
            streaming_B: Boolean, True for rows whose positions see no further than the end of their
                own chunk; None if no row is streaming.

        Returns:
            Hidden frames, (B, T, D); undefined on padding.
        """
        x = self.dropout(self.embed(x_BND) * math.sqrt(self.width))
        if not self.include_padding:
            x = x * valid_mask(lengths_B, x.size(1)).unsqueeze(-1)
        x = self.pre_lookahead_layer(x)[:, : frames // self.factor]
        positions = self._positions(x)
        valid = valid_mask(frames_B // self.factor, x.size(1))
        visible = visible_keys(valid, self.chunk, streaming_B)
        for layer in self.encoders:
            x = layer(x, positions, visible)[0]
        x = self.dropout(self.up_embed(self.up_layer(x)) * math.sqrt(self.width))
        positions = self._positions(x)
        valid = valid_mask(frames_B, x.size(1))
        visible = visible_keys(valid, self.chunk * self.factor, streaming_B)
        for layer in self.up_encoders:
            x = layer(x, positions, visible)[0]
        return self.after_norm(x)

    def _positions(self, x_BTD: Tensor) -> Tensor:
        return self.dropout(distance_table(x_BTD.size(1) - 1, 1 - x_BTD.size(1), self.width, x_BTD))
