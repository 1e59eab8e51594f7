"""The transformer blocks of the U-Net, as in Matcha-TTS (Mehta et al. 2024, section 2.2).

B batch, C channels, T mel frames.
"""

from torch import Tensor, nn
from torch.nn import functional

from cosyexp.models.layers.attention import SelfAttention


class GeluProjection(nn.Module):
    """Linear layer and exact GELU (Hendrycks & Gimpel 2016), as `GELU` of diffusers.

    Args:
        channels: Number of input channels.
        hidden: Number of output channels.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to the last dimension."""
        return functional.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Feed-forward network of a transformer block (Mehta et al. 2024, "Matcha-TTS").

    Mirrors `FeedForward` of Matcha-TTS.

    Args:
        channels: C; there are 4C hidden channels.
        dropout: Dropout probability after the activation.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(channels, 4 * channels),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies the network to the last dimension."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, `BasicTransformerBlock` of Matcha-TTS (Mehta et al. 2024).

    Args:
        channels: C.
        heads: Number of attention heads.
        head_width: Channels of a head.
        dropout: Dropout probability.
    """

    def __init__(self, channels: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads, head_width, dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    def forward(
        self, x_BTC: Tensor, visible: Tensor, past: list[list[Tensor]] | None = None
    ) -> Tensor:
        """Applies the block; see `SelfAttention` for `visible` and `past`."""
        x_BTC = x_BTC + self.attn1(self.norm1(x_BTC), visible, None, past)
        return x_BTC + self.ff(self.norm3(x_BTC))
