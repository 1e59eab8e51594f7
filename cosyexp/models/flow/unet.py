"""The U-Net that estimates the velocity of the v1 and v2 flows.

It follows the decoder of Matcha-TTS (Mehta et al. 2024, section 2.2).

B batch, C channels, D width of the embedded time, F mel bands, T mel frames at this level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.arguments import Count, Fraction
from cosyexp.models.flow.parts import CenteredConv, PaddedConv, frames_past, time_features
from cosyexp.models.flow.transformer import TransformerBlock
from cosyexp.models.layers.encoder import visible_keys
from cosyexp.models.layers.norm import FrameNorm, MaskedGroupNorm
from cosyexp.registry import register


def convolution(channels: int, out_channels: int, causal: bool) -> nn.Conv1d:
    """Returns a convolution of kernel size 3 that keeps the number of frames.

    Args:
        channels: Number of input channels.
        out_channels: Number of output channels.
        causal: Whether it sees the two frames before, instead of one on either side.

    Returns:
        The convolution.
    """
    if causal:
        return PaddedConv(channels, out_channels, 3, left=2)
    return CenteredConv(channels, out_channels, 3, padding=1)


class Block(nn.Module):
    """Convolution, normalization and Mish (Mehta et al. 2024, "Matcha-TTS").

    Mirrors `Block1D` of Matcha-TTS, with a group norm, or `CausalBlock1D` of the original
    CosyVoice, with a layer norm of each frame.

    Args:
        channels: Number of input channels.
        out_channels: Number of output channels.
        causal: Whether the block is causal.
    """

    def __init__(self, channels: int, out_channels: int, causal: bool) -> None:
        super().__init__()
        norm: list[nn.Module]
        if causal:
            # The official checkpoints name parameters by index, and have the norm at index 2.
            norm = [nn.Identity(), FrameNorm(out_channels)]
        else:
            norm = [MaskedGroupNorm(8, out_channels)]
        self.block = nn.ModuleList([convolution(channels, out_channels, causal), *norm])

    def forward(
        self,
        x_BCT: Tensor,
        mask_B1T: Tensor,
        statistics_B1T: Tensor,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Applies the block.

        Args:
            x_BCT: The input.
            mask_B1T: 1 on valid frames, 0 on padding.
            statistics_B1T: 1 on frames that count in the statistics of the group norm.
            past: What a causal block kept of the frames before, see `parts.py`.

        Returns:
            The output, 0 on padding.
        """
        x_BCT = self.block[0](x_BCT * mask_B1T, past)
        return functional.mish(self.block[-1](x_BCT, statistics_B1T)) * mask_B1T


class ResnetBlock(nn.Module):
    """Two blocks with the embedded time added in between, and a residual convolution.

    Mirrors `ResnetBlock1D` of Matcha-TTS (Mehta et al. 2024).

    Args:
        channels: Number of input channels.
        out_channels: Number of output channels.
        time_width: D.
        causal: Whether the blocks are causal.
    """

    def __init__(self, channels: int, out_channels: int, time_width: int, causal: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, out_channels))
        self.block1 = Block(channels, out_channels, causal)
        self.block2 = Block(out_channels, out_channels, causal)
        self.res_conv = nn.Conv1d(channels, out_channels, 1)

    def forward(
        self,
        x_BCT: Tensor,
        mask_B1T: Tensor,
        statistics_B1T: Tensor,
        time_BD: Tensor,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Applies the block; see `Block` for the masks and `past`."""
        h = self.block1(x_BCT, mask_B1T, statistics_B1T, past) + self.mlp(time_BD).unsqueeze(-1)
        return self.block2(h, mask_B1T, statistics_B1T, past) + self.res_conv(x_BCT * mask_B1T)


class Resample(nn.Module):
    """Wraps a resampling convolution under its name in the official checkpoints.

    Mirrors `Downsample1D` and `Upsample1D` of Matcha-TTS (Mehta et al. 2024).

    Args:
        conv: A `Conv1d` that halves the number of frames, or a `ConvTranspose1d` that doubles it.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        """Resamples `x`; it is not causal, and keeps nothing in `past`."""
        return self.conv(x)


class Frames(NamedTuple):
    """The masks of the frames at one level.

    Attributes:
        mask_B1T: 1 on valid frames, 0 on padding.
        statistics_B1T: 1 on frames that count in the statistics of group norms.
        visible: Boolean attention mask that broadcasts to (B, 1, T, T).
    """

    mask_B1T: Tensor
    statistics_B1T: Tensor
    visible: Tensor


class Level(nn.ModuleList):
    """One level of the U-Net: a ResNet block, transformer blocks, and the convolution after them.

    It is a list, so that parameters have the names of the official checkpoints (Matcha-TTS,
    Mehta et al. 2024). `forward` leaves the convolution to the caller, who needs the output before
    it for the skip connection.

    Args:
        channels: Number of input channels.
        out: Number of output channels.
        time: Width of the embedded time.
        blocks: Number of transformer blocks.
        heads: Number of attention heads.
        head_width: Channels of a head.
        dropout: Dropout probability.
        causal: Whether the convolutions are causal.
        end: The convolution at the end; None in the middle of the U-Net.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        time: int,
        blocks: Count,
        heads: int,
        head_width: int,
        dropout: Fraction,
        causal: bool,
        end: nn.Module | None,
    ) -> None:
        attention = nn.ModuleList(
            TransformerBlock(out, heads, head_width, dropout) for _ in range(blocks)
        )
        ends = [] if end is None else [end]
        super().__init__([ResnetBlock(channels, out, time, causal), attention, *ends])

    def forward(
        self,
        x_BCT: Tensor,
        frames: Frames,
        time_BD: Tensor,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Applies the ResNet block and the transformer blocks, but not the convolution."""
        x_BCT = self[0](x_BCT, frames.mask_B1T, frames.statistics_B1T, time_BD, past)
        x_BTC = x_BCT.transpose(1, 2)
        for block in self[1]:  # type: ignore[attr-defined]
            x_BTC = block(x_BTC, frames.visible, past)
        return x_BTC.transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Embeds the flow's time, as `TimestepEmbedding` of Matcha-TTS (Mehta et al. 2024).

    Args:
        width: Number of sinusoidal features.
        time_width: D.
    """

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, time_B: Tensor) -> Tensor:
        """Returns the embedded time, (B, D)."""
        return self.linear_2(functional.silu(self.linear_1(time_features(time_B, self.width))))


@register("module")
class UNet(nn.Module):
    """U-Net that estimates the velocity of the v1 and v2 flows (Mehta et al. 2024, "Matcha-TTS").

    Mirrors `ConditionalDecoder` (v1) and `CausalConditionalDecoder` (v2) of the original CosyVoice.

    Args:
        mel_bins: F.
        channels: Channels of each level; every level but the last halves the number of frames.
        blocks: Number of transformer blocks per level.
        mid_blocks: Number of levels in the middle.
        heads: Number of attention heads.
        head_width: Channels of a head.
        dropout: Dropout probability of the transformer blocks.
        causal: Whether convolutions are causal and norms see a single frame.
        chunk: Chunk size of streaming rows, in frames; 0 for none.
        padding: "own" keeps the rows of a batch independent; "original" counts padding in the
            statistics of the group norms, as the original does.

    Raises:
        ValueError: `padding` is unknown.
    """

    def __init__(
        self,
        *,
        mel_bins: int,
        channels: Sequence[int],
        blocks: Count,
        mid_blocks: Count,
        heads: int,
        head_width: int,
        dropout: Fraction = 0.0,
        causal: bool = False,
        chunk: Count = 0,
        padding: str = "own",
    ) -> None:
        super().__init__()
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} must be 'own' or 'original'")
        widths = list(channels)
        time, last = 4 * widths[0], len(widths) - 1
        shared = (time, blocks, heads, head_width, dropout, causal)
        self.chunk, self.include_padding = chunk, padding == "original"
        self.time_mlp = TimeEmbedding(4 * mel_bins, time)
        self.down_blocks = nn.ModuleList()
        for i, (before, out) in enumerate(zip([4 * mel_bins, *widths], widths, strict=False)):
            end: nn.Module
            if i < last:
                end = Resample(nn.Conv1d(out, out, 3, 2, 1))
            else:
                end = convolution(out, out, causal)
            self.down_blocks.append(Level(before, out, *shared, end=end))
        self.mid_blocks = nn.ModuleList(
            Level(widths[-1], widths[-1], *shared, end=None) for _ in range(mid_blocks)
        )
        self.up_blocks = nn.ModuleList()
        up_widths = [*widths[-2::-1], widths[0]]
        for i, (before, out) in enumerate(zip(widths[::-1], up_widths, strict=True)):
            if i < last:
                end = Resample(nn.ConvTranspose1d(out, out, 4, 2, 1))
            else:
                end = convolution(out, out, causal)
            # The input is the output of the level below, concatenated with the skip connection.
            self.up_blocks.append(Level(2 * before, out, *shared, end=end))
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
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Estimates the velocity.

        Args:
            x_BFT: The noisy mel.
            mask_B1T: 1 on valid frames, 0 on padding.
            mu_BFT: The encoded tokens.
            t_B: The time, in [0, 1].
            spks_BF: The projected speaker embedding.
            cond_BFT: The mel of the prompt, 0 after it.
            streaming_B: Boolean, True for rows whose frames see no further than the end of their
                own chunk; None if no row is streaming.
            past: What a causal network of one level kept of the frames before, see `parts.py`.

        Returns:
            The velocity, (B, F, T), 0 on padding.
        """
        speaker = spks_BF.unsqueeze(-1).expand(-1, -1, x_BFT.size(-1))
        x = torch.cat([x_BFT, mu_BFT, speaker, cond_BFT], dim=1)
        time = self.time_mlp(t_B)
        before = frames_past(past)
        frames_of_levels, skips = [self._frames(mask_B1T, streaming_B, before)], []
        for i, level in enumerate(self.down_blocks):
            frames = frames_of_levels[i]
            x = level(x, frames, time, past)
            skips.append(x)
            x = level[2](x * frames.mask_B1T, past)  # type: ignore[index]
            if i + 1 < len(self.down_blocks):
                halved_B1T = frames.mask_B1T[:, :, ::2]
                frames_of_levels.append(self._frames(halved_B1T, streaming_B, before))
        for level in self.mid_blocks:
            x = level(x, frames_of_levels[-1], time, past)
        for level in self.up_blocks:
            frames, skip = frames_of_levels.pop(), skips.pop()
            # Upsampling may add a frame. A slice instead of index_select would tie an exported
            # program to even or to odd numbers of frames.
            index = torch.arange(skip.size(2), device=x.device)
            x = torch.cat([x.index_select(2, index), skip], dim=1)
            x = level(x, frames, time, past)
            x = level[2](x * frames.mask_B1T, past)  # type: ignore[index]
        x = self.final_block(x, mask_B1T, self._statistics(mask_B1T), past)
        return self.final_proj(x * mask_B1T) * mask_B1T

    def _frames(self, mask_B1T: Tensor, streaming_B: Tensor | None, past: int) -> Frames:
        visible = visible_keys(mask_B1T[:, 0] > 0, self.chunk, streaming_B, past)
        return Frames(mask_B1T, self._statistics(mask_B1T), visible)

    def _statistics(self, mask_B1T: Tensor) -> Tensor:
        """Returns the mask of the frames that group norms count."""
        return torch.ones_like(mask_B1T) if self.include_padding else mask_B1T
