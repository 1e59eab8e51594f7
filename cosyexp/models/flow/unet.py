"""The U-Net that estimates the velocity of the flow (Matcha-TTS, Mehta et al. 2024, section 2.2).

B batch, C channels, F mel bands, T mel frames at this level, K width of a head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.models.layers.norm import MaskedGroupNorm


class Block(nn.Module):
    """Convolution, group norm over the row's own frames, Mish."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.Conv1d(channels, out_channels, 3, padding=1), MaskedGroupNorm(8, out_channels)])

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor, statistics_B1T: Tensor) -> Tensor:
        x_BCT = self.block[0](x_BCT * mask_B1T)
        return functional.mish(self.block[1](x_BCT, statistics_B1T)) * mask_B1T


class ResnetBlock(nn.Module):
    """Two blocks with the embedded time added between them, and a 1x1 residual."""

    def __init__(self, channels: int, out_channels: int, time_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, out_channels))
        self.block1 = Block(channels, out_channels)
        self.block2 = Block(out_channels, out_channels)
        self.res_conv = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor, statistics_B1T: Tensor, time_BD: Tensor) -> Tensor:
        h = self.block1(x_BCT, mask_B1T, statistics_B1T) + self.mlp(time_BD).unsqueeze(-1)
        return self.block2(h, mask_B1T, statistics_B1T) + self.res_conv(x_BCT * mask_B1T)


class Attention(nn.Module):
    """Multi-head self-attention whose inner width need not be the outer one."""

    def __init__(self, channels: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_width, bias=False)
        self.to_k = nn.Linear(channels, heads * head_width, bias=False)
        self.to_v = nn.Linear(channels, heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, channels))

    def forward(self, x_BTC: Tensor, visible: Tensor) -> Tensor:
        q = self.to_q(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GeluProjection(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(GeluProjection(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, under the key names of the original's block."""

    def __init__(self, channels: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, head_width)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, visible: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attn1(self.norm1(x_BTC), visible))
        return x_BTC + self.ff(self.norm3(x_BTC))


class Resample(nn.Module):
    """Halves (`Conv1d`) or doubles (`ConvTranspose1d`) the number of frames."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.ModuleList):
    """[resnet, transformer blocks, optional convolution at the end]: one step down, in the middle, or up."""

    def __init__(
        self, channels: int, out: int, time: int, blocks: int, heads: int, head_width: int, dropout: float, end: nn.Module | None
    ) -> None:
        attention = nn.ModuleList(TransformerBlock(out, heads, head_width, dropout) for _ in range(blocks))
        super().__init__([ResnetBlock(channels, out, time), attention, *([end] if end is not None else [])])

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor, statistics_B1T: Tensor, time_BD: Tensor) -> Tensor:
        x_BTC = self[0](x_BCT, mask_B1T, statistics_B1T, time_BD).transpose(1, 2)
        visible = (mask_B1T > 0).unsqueeze(1)
        for block in self[1]:  # type: ignore[attr-defined]
            x_BTC = block(x_BTC, visible)
        return x_BTC.transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then linear, SiLU, linear."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, time_B: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=time_B.device) * (-math.log(10000.0) / (half - 1))
        angles = 1000.0 * time_B.unsqueeze(1) * torch.exp(steps).unsqueeze(0).to(time_B.dtype)
        features = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
        return self.linear_2(functional.silu(self.linear_1(features)))


class UNet(nn.Module):
    """Velocity of the flow at time t, from the noisy mel and its conditions.

    mel_bins: F; the input is [noisy mel, mu, speaker, prompt], 4 F channels.
    channels: width of each level; every level but the last halves the number of frames.
    blocks, mid_blocks: transformer blocks in a level, levels in the middle.
    heads, head_width: of every attention.
    padding: "own" keeps the rows of a batch apart, "original" counts their padding in the group norms.
    """

    def __init__(
        self,
        *,
        mel_bins: int,
        channels: Sequence[int],
        blocks: int,
        mid_blocks: int,
        heads: int,
        head_width: int,
        dropout: float = 0.0,
        padding: str = "own",
    ) -> None:
        super().__init__()
        widths = list(channels)
        time, last = 4 * widths[0], len(widths) - 1
        rest = (time, blocks, heads, head_width, dropout)
        self.time_mlp = TimeEmbedding(4 * mel_bins, time)
        self.down_blocks = nn.ModuleList()
        for i, (before, out) in enumerate(zip([4 * mel_bins, *widths], widths, strict=False)):
            down = Resample(nn.Conv1d(out, out, 3, 2, 1)) if i < last else nn.Conv1d(out, out, 3, padding=1)
            self.down_blocks.append(Level(before, out, *rest, end=down))
        self.mid_blocks = nn.ModuleList(Level(widths[-1], widths[-1], *rest, end=None) for _ in range(mid_blocks))
        self.up_blocks = nn.ModuleList()
        for i, (before, out) in enumerate(zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True)):
            up = Resample(nn.ConvTranspose1d(out, out, 4, 2, 1)) if i < last else nn.Conv1d(out, out, 3, padding=1)
            self.up_blocks.append(Level(2 * before, out, *rest, end=up))
        self.final_block = Block(widths[0], widths[0])
        self.final_proj = nn.Conv1d(widths[0], mel_bins, 1)
        self.whole_rows = padding == "original"

    def forward(self, x_BFT: Tensor, mask_B1T: Tensor, mu_BFT: Tensor, t_B: Tensor, spks_BF: Tensor, cond_BFT: Tensor) -> Tensor:
        """mask: 1 on the valid frames of each row, 0 behind them. Returns the velocity (B, F, T), 0 on padding."""
        speaker = spks_BF.unsqueeze(-1).expand(-1, -1, x_BFT.size(-1))
        x = torch.cat([x_BFT, mu_BFT, speaker, cond_BFT], dim=1)
        time = self.time_mlp(t_B)
        masks, skips = [mask_B1T], []
        for level in self.down_blocks:
            mask = masks[-1]
            x = level(x, mask, self._statistics(mask), time)
            skips.append(x)
            x = level[2](x * mask)  # type: ignore[index]
            masks.append(mask[:, :, ::2])
        masks.pop()
        for level in self.mid_blocks:
            x = level(x, masks[-1], self._statistics(masks[-1]), time)
        for level in self.up_blocks:
            mask, skip = masks.pop(), skips.pop()
            x = torch.cat([x[:, :, : skip.size(-1)], skip], dim=1)
            x = level(x, mask, self._statistics(mask), time)
            x = level[2](x * mask)  # type: ignore[index]
        x = self.final_block(x, mask_B1T, self._statistics(mask_B1T))
        return self.final_proj(x * mask_B1T) * mask_B1T

    def _statistics(self, mask: Tensor) -> Tensor:
        """The frames that a group norm counts: the row's own ones, or, as the original does, its padding too."""
        return torch.ones_like(mask) if self.whole_rows else mask
