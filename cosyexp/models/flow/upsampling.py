"""The encoder of the v2 family: from speech tokens to hidden mel frames at a fixed ratio.

B batch, N speech tokens, D width, T mel frames.
"""

import math

from torch import Tensor, nn

from cosyexp.models.flow.parts import LookAhead, PaddedConv
from cosyexp.models.layers.attention import distance_table
from cosyexp.models.layers.encoder import ConformerLayer, InputEmbedding, valid_mask, visible_keys


class Upsample(nn.Module):
    """Repeats each position `factor` times, then smooths with a causal convolution."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = PaddedConv(width, width, 2 * factor + 1, left=2 * factor)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.conv(x_BTD.repeat_interleave(self.factor, dim=1).transpose(1, 2)).transpose(
            1, 2
        )


class UpsamplingEncoder(nn.Module):
    """Look-ahead, conformer layers over tokens, upsampling, conformer layers over frames (Du et al. 2024, "CosyVoice 2", section 2.4).

    width, heads, hidden (feed-forward), blocks (over tokens), up_blocks (over frames): sizes. factor: frames of a token.
    look_ahead: tokens that are looked at ahead. chunk: tokens that a streaming row sees at once.
    padding: "original" lets the look-ahead read what is behind a row, as the original does; "own" does not.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        blocks: int,
        up_blocks: int,
        factor: int,
        look_ahead: int,
        chunk: int,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        padding: str = "own",
    ) -> None:
        super().__init__()
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} is neither 'own' nor 'original'")

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                ConformerLayer(width, heads, hidden, dropout, attention_dropout)
                for _ in range(count)
            )

        self.width, self.factor, self.chunk, self.whole_rows = (
            width,
            factor,
            chunk,
            padding == "original",
        )
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
        """Returns (B, frames, D). Tokens behind those that the frames cover are looked at ahead, no more."""
        x = self.dropout(self.embed(x_BND) * math.sqrt(self.width))
        if not self.whole_rows:
            x = x * valid_mask(lengths_B, x.size(1)).unsqueeze(-1)
        x = self.pre_lookahead_layer(x)[:, : frames // self.factor]
        positions = self._positions(x)
        visible = visible_keys(
            valid_mask(frames_B // self.factor, x.size(1)), self.chunk, streaming_B
        )
        for layer in self.encoders:
            x = layer(x, positions, visible)[0]
        x = self.dropout(self.up_embed(self.up_layer(x)) * math.sqrt(self.width))
        positions = self._positions(x)
        visible = visible_keys(
            valid_mask(frames_B, x.size(1)), self.chunk * self.factor, streaming_B
        )
        for layer in self.up_encoders:
            x = layer(x, positions, visible)[0]
        return self.after_norm(x)

    def _positions(self, x_BTD: Tensor) -> Tensor:
        return self.dropout(distance_table(x_BTD.size(1) - 1, 1 - x_BTD.size(1), self.width, x_BTD))
