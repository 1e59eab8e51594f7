"""The diffusion transformer that estimates the velocity of the v3 flow.

It follows DiT (Peebles & Xie 2023) and F5-TTS (Chen et al. 2024, section 3). Unless stated
otherwise, classes mirror modules in `cosyvoice/flow/DiT` of the original CosyVoice.

B batch, C channels, F mel bands, T mel frames, R head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.arguments import Count, Fraction
from cosyexp.models.flow.parts import PaddedConv, frames_past, time_features
from cosyexp.models.layers.attention import SelfAttention
from cosyexp.models.layers.encoder import visible_keys
from cosyexp.registry import register


class TimeEmbedding(nn.Module):
    """Embeds the flow's time (Peebles & Xie 2023), as `TimestepEmbedding` of the original.

    Args:
        channels: C.
        width: Number of sinusoidal features.
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(
            nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, time_B: Tensor) -> Tensor:
        """Returns the embedded time, (B, C)."""
        return self.time_mlp(time_features(time_B, self.width))


class PositionEmbedding(nn.Module):
    """Position embedding by two causal grouped convolutions (Chen et al. 2024, "F5-TTS").

    Mirrors `CausalConvPositionEmbedding` of the original.

    Args:
        channels: C.
        kernel: Kernel size in frames.
        groups: Number of groups of channels.
    """

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            PaddedConv(channels, channels, kernel, left=kernel - 1, groups=groups), nn.Mish()
        )
        self.conv2 = nn.Sequential(
            PaddedConv(channels, channels, kernel, left=kernel - 1, groups=groups), nn.Mish()
        )

    def forward(self, x_BTC: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        """Returns the embedding of each frame's position, (B, T, C); for `past`, see `parts.py`."""
        x_BCT = self.conv1[1](self.conv1[0](x_BTC.transpose(1, 2), past))
        return self.conv2[1](self.conv2[0](x_BCT, past)).transpose(1, 2)


class InputEmbedding(nn.Module):
    """Projects the concatenated inputs and adds positions (Chen et al. 2024, "F5-TTS").

    Mirrors `InputEmbedding` of the original.

    Args:
        mel_bins: F; the input has 4F channels.
        channels: C.
        kernel: See `PositionEmbedding`.
        groups: See `PositionEmbedding`.
    """

    def __init__(self, mel_bins: int, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * mel_bins, channels)
        self.conv_pos_embed = PositionEmbedding(channels, kernel, groups)

    def forward(self, x_BTC: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        """Embeds [noisy mel, prompt, mu, speaker], (B, T, 4F), as (B, T, C)."""
        x_BTC = self.proj(x_BTC)
        return x_BTC + self.conv_pos_embed(x_BTC, past)


class RotaryPositions(nn.Module):
    """Computes the angles of rotary positions (Su et al. 2021, "RoFormer").

    The buffer `inv_freq` exists because it is in the official checkpoints. It is not read: it may
    be in half precision, but angles need full precision.

    Args:
        head_width: R.
    """

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        exponents = torch.arange(0, head_width, 2).float() / head_width
        self.register_buffer("inv_freq", 1 / 10000.0**exponents)

    def forward(self, frames: int, first: int = 0) -> Tensor:
        """Returns the angles of T frames in radians, (T, R): R / 2 frequencies, each twice.

        Args:
            frames: T.
            first: The position of the first one.
        """
        channels = torch.arange(0, self.head_width, 2, device=self.inv_freq.device).float()
        positions = (torch.arange(frames, device=self.inv_freq.device) + first).float()
        angles = positions.unsqueeze(1) / 10000.0 ** (channels / self.head_width)
        return angles.repeat_interleave(2, dim=-1)


class AdaptiveNorm(nn.Module):
    """Projects the embedded time to shifts, scales and gates of adaptive layer norms.

    Mirrors `AdaLayerNormZero` and `AdaLayerNormZero_Final` of the original (adaLN-Zero, Peebles &
    Xie 2023, section 3.2); the layer norm itself, which has no weights, is in `modulated`.

    Args:
        channels: C.
        vectors: How many vectors of C channels to compute.
    """

    def __init__(self, channels: int, vectors: int) -> None:
        super().__init__()
        self.channels, self.vectors = channels, vectors
        self.linear = nn.Linear(channels, vectors * channels)

    def forward(self, time_BC: Tensor) -> Tensor:
        """Returns the vectors, (vectors, B, 1, C)."""
        vectors = self.linear(functional.silu(time_BC))
        return vectors.unflatten(-1, (self.vectors, 1, self.channels)).transpose(0, 1)


def modulated(x_BTC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """Returns the layer norm of `x` without weights, scaled by 1 + scale and shifted."""
    return functional.layer_norm(x_BTC, x_BTC.shape[-1:], eps=1e-6) * (1 + scale_B1C) + shift_B1C


class FeedForward(nn.Module):
    """Feed-forward network with tanh-approximated GELU, as `FeedForward` of the original.

    Args:
        channels: C.
        hidden: Number of hidden channels.
        dropout: Dropout probability after the activation.
    """

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh")),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Applies the network to every frame."""
        return self.ff(x_BTC)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero (Peebles & Xie 2023, section 3.2).

    The time shifts and scales the inputs of attention and feed-forward network, and gates their
    outputs. Mirrors `DiTBlock` of the original.

    Args:
        channels: C.
        heads: Number of attention heads.
        head_width: R.
        hidden: Hidden channels of the feed-forward network.
        dropout: Dropout probability.
    """

    def __init__(
        self, channels: int, heads: int, head_width: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.attn_norm = AdaptiveNorm(channels, 6)
        self.attn = SelfAttention(channels, heads, head_width, dropout, bias=True)
        self.ff = FeedForward(channels, hidden, dropout)

    def forward(
        self,
        x_BTC: Tensor,
        time_BC: Tensor,
        valid_BT1: Tensor,
        visible: Tensor,
        angles_TR: Tensor,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Applies the block.

        Args:
            x_BTC: The input.
            time_BC: The embedded time.
            valid_BT1: 1 on valid frames, 0 on padding.
            visible: Boolean attention mask, see `SelfAttention`.
            angles_TR: Rotary angles, see `RotaryPositions`.
            past: See `SelfAttention`.

        Returns:
            The output, (B, T, C).
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.attn_norm(time_BC).unbind(0)
        attended = self.attn(modulated(x_BTC, shift, scale), visible, angles_TR, past)
        x_BTC = x_BTC + gate * (attended * valid_BT1)
        return x_BTC + ff_gate * self.ff(modulated(x_BTC, ff_shift, ff_scale))


@register("module")
class DiT(nn.Module):
    """Diffusion transformer that estimates the velocity of the v3 flow (Peebles & Xie 2023).

    Mirrors `DiT` of the original CosyVoice.

    Args:
        mel_bins: F.
        width: C.
        blocks: Number of transformer blocks.
        heads: Number of attention heads.
        head_width: R.
        hidden: Hidden channels of the feed-forward networks.
        kernel: Kernel size of the position embedding, in frames.
        groups: Number of groups of channels of the position embedding.
        chunk: Chunk size of streaming rows, in frames; 0 for none.
        dropout: Dropout probability.
    """

    def __init__(
        self,
        *,
        mel_bins: int,
        width: int,
        blocks: int,
        heads: int,
        head_width: int,
        hidden: int,
        kernel: int = 31,
        groups: int = 16,
        chunk: Count = 0,
        dropout: Fraction = 0.1,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.time_embed = TimeEmbedding(width)
        self.input_embed = InputEmbedding(mel_bins, width, kernel, groups)
        self.rotary_embed = RotaryPositions(head_width)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(width, heads, head_width, hidden, dropout) for _ in range(blocks)
        )
        self.norm_out = AdaptiveNorm(width, 2)
        self.proj_out = nn.Linear(width, mel_bins)

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
            past: What the network kept of the frames before, see `parts.py`.

        Returns:
            The velocity, (B, F, T); undefined on padding.
        """
        speaker = spks_BF.unsqueeze(-1).expand(-1, -1, x_BFT.size(-1))
        x = torch.cat([x_BFT, cond_BFT, mu_BFT, speaker], dim=1).transpose(1, 2)
        x, before = self.input_embed(x, past), frames_past(past)
        time, angles = self.time_embed(t_B), self.rotary_embed(x_BFT.size(-1), before)
        visible = visible_keys(mask_B1T[:, 0] > 0, self.chunk, streaming_B, before)
        for block in self.transformer_blocks:
            x = block(x, time, mask_B1T.transpose(1, 2), visible, angles, past)
        # The official checkpoints store these two in the opposite order of those in the blocks.
        scale, shift = self.norm_out(time).unbind(0)
        return self.proj_out(modulated(x, shift, scale)).transpose(1, 2)
