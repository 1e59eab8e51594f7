"""The U-Net that estimates the velocity of the flow (Matcha-TTS, Mehta et al. 2024, section 2.2).

B batch, C channels, F mel bands, T mel frames at this level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.models.flow.parts import PaddedConv, time_features
from cosyexp.models.layers.attention import SelfAttention
from cosyexp.models.layers.encoder import visible_keys
from cosyexp.models.layers.norm import FrameNorm, MaskedGroupNorm


def convolution(channels: int, out_channels: int, causal: bool) -> nn.Conv1d:
    """Over three frames: the one before and the one behind, or the two before."""
    return (
        PaddedConv(channels, out_channels, 3, left=2)
        if causal
        else nn.Conv1d(channels, out_channels, 3, padding=1)
    )


class Block(nn.Module):
    """Convolution, norm, Mish: a group norm over the row's own frames, or, if causal, a layer norm of each frame."""

    def __init__(self, channels: int, out_channels: int, causal: bool) -> None:
        super().__init__()
        norm = (
            [nn.Identity(), FrameNorm(out_channels)]
            if causal
            else [MaskedGroupNorm(8, out_channels)]
        )
        self.block = nn.ModuleList([convolution(channels, out_channels, causal), *norm])

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor, statistics_B1T: Tensor) -> Tensor:
        x_BCT = self.block[0](x_BCT * mask_B1T)
        return functional.mish(self.block[-1](x_BCT, statistics_B1T)) * mask_B1T


class ResnetBlock(nn.Module):
    """Two blocks with the embedded time added between them, and a 1x1 residual."""

    def __init__(self, channels: int, out_channels: int, time_width: int, causal: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, out_channels))
        self.block1 = Block(channels, out_channels, causal)
        self.block2 = Block(out_channels, out_channels, causal)
        self.res_conv = nn.Conv1d(channels, out_channels, 1)

    def forward(
        self, x_BCT: Tensor, mask_B1T: Tensor, statistics_B1T: Tensor, time_BD: Tensor
    ) -> Tensor:
        h = self.block1(x_BCT, mask_B1T, statistics_B1T) + self.mlp(time_BD).unsqueeze(-1)
        return self.block2(h, mask_B1T, statistics_B1T) + self.res_conv(x_BCT * mask_B1T)


class GeluProjection(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(channels, 4 * channels),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, under the key names of the original's block."""

    def __init__(self, channels: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads, head_width, dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    def forward(self, x_BTC: Tensor, visible: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn1(self.norm1(x_BTC), visible)
        return x_BTC + self.ff(self.norm3(x_BTC))


class Resample(nn.Module):
    """Halves (`Conv1d`) or doubles (`ConvTranspose1d`) the number of frames."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Frames(NamedTuple):
    """The frames at one level: which are valid, which a group norm counts, which each sees in attention."""

    mask_B1T: Tensor
    statistics_B1T: Tensor
    visible: Tensor


class Level(nn.ModuleList):
    """[resnet, transformer blocks, optional convolution at the end]: one step down, in the middle, or up."""

    def __init__(
        self,
        channels: int,
        out: int,
        time: int,
        blocks: int,
        heads: int,
        head_width: int,
        dropout: float,
        causal: bool,
        end: nn.Module | None,
    ) -> None:
        attention = nn.ModuleList(
            TransformerBlock(out, heads, head_width, dropout) for _ in range(blocks)
        )
        super().__init__(
            [
                ResnetBlock(channels, out, time, causal),
                attention,
                *([end] if end is not None else []),
            ]
        )

    def forward(self, x_BCT: Tensor, frames: Frames, time_BD: Tensor) -> Tensor:
        x_BTC = self[0](x_BCT, frames.mask_B1T, frames.statistics_B1T, time_BD).transpose(1, 2)
        for block in self[1]:  # type: ignore[attr-defined]
            x_BTC = block(x_BTC, frames.visible)
        return x_BTC.transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then linear, SiLU, linear."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, time_B: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(time_features(time_B, self.width))))


class UNet(nn.Module):
    """Velocity of the flow at time t, from the noisy mel and its conditions.

    mel_bins: F; the input is [noisy mel, mu, speaker, prompt], 4 F channels.
    channels: width of each level; every level but the last halves the number of frames.
    blocks, mid_blocks: transformer blocks in a level, levels in the middle.
    heads, head_width: of every attention.
    causal: convolutions look at no later frame, and norms at none but their own. chunk: frames that a streaming row sees at once.
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
        causal: bool = False,
        chunk: int = 0,
        padding: str = "own",
    ) -> None:
        super().__init__()
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} is neither 'own' nor 'original'")
        widths = list(channels)
        time, last = 4 * widths[0], len(widths) - 1
        rest = (time, blocks, heads, head_width, dropout, causal)
        self.chunk, self.whole_rows = chunk, padding == "original"
        self.time_mlp = TimeEmbedding(4 * mel_bins, time)
        self.down_blocks = nn.ModuleList()
        for i, (before, out) in enumerate(zip([4 * mel_bins, *widths], widths, strict=False)):
            down = (
                Resample(nn.Conv1d(out, out, 3, 2, 1))
                if i < last
                else convolution(out, out, causal)
            )
            self.down_blocks.append(Level(before, out, *rest, end=down))
        self.mid_blocks = nn.ModuleList(
            Level(widths[-1], widths[-1], *rest, end=None) for _ in range(mid_blocks)
        )
        self.up_blocks = nn.ModuleList()
        for i, (before, out) in enumerate(
            zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True)
        ):
            up = (
                Resample(nn.ConvTranspose1d(out, out, 4, 2, 1))
                if i < last
                else convolution(out, out, causal)
            )
            self.up_blocks.append(Level(2 * before, out, *rest, end=up))
        self.final_block = Block(widths[0], widths[0], causal)
        self.final_proj = nn.Conv1d(widths[0], mel_bins, 1)

    def forward(
        self,
        x_BFT: Tensor,
        mask_B1T: Tensor,
        mu_BFT: Tensor,
        t_B: Tensor,
        spks_BF: Tensor,
        cond_BFT: Tensor,
        streaming_B: Tensor | None = None,
    ) -> Tensor:
        """mask: 1 on the valid frames of each row, 0 behind them. Returns the velocity (B, F, T), 0 on padding."""
        speaker = spks_BF.unsqueeze(-1).expand(-1, -1, x_BFT.size(-1))
        x = torch.cat([x_BFT, mu_BFT, speaker, cond_BFT], dim=1)
        time = self.time_mlp(t_B)
        depths, skips = [self._frames(mask_B1T, streaming_B)], []
        for i, level in enumerate(self.down_blocks):
            x = level(x, depths[i], time)
            skips.append(x)
            x = level[2](x * depths[i].mask_B1T)  # type: ignore[index]
            if i + 1 < len(self.down_blocks):
                depths.append(self._frames(depths[i].mask_B1T[:, :, ::2], streaming_B))
        for level in self.mid_blocks:
            x = level(x, depths[-1], time)
        for level in self.up_blocks:
            frames, skip = depths.pop(), skips.pop()
            there = torch.arange(
                skip.size(2), device=x.device
            )  # a slice would tie an exported program to even or to odd numbers of frames
            x = torch.cat([x.index_select(2, there), skip], dim=1)
            x = level(x, frames, time)
            x = level[2](x * frames.mask_B1T)  # type: ignore[index]
        x = self.final_block(
            x, mask_B1T, torch.ones_like(mask_B1T) if self.whole_rows else mask_B1T
        )
        return self.final_proj(x * mask_B1T) * mask_B1T

    def _frames(self, mask_B1T: Tensor, streaming_B: Tensor | None) -> Frames:
        statistics = (
            torch.ones_like(mask_B1T) if self.whole_rows else mask_B1T
        )  # the original counts padding too
        return Frames(
            mask_B1T, statistics, visible_keys(mask_B1T[:, 0] > 0, self.chunk, streaming_B)
        )
