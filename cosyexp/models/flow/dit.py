"""The diffusion transformer that estimates the velocity of the v3 flow (Peebles & Xie 2023; F5-TTS, Chen et al. 2024, section 3).

B batch, C channels, F mel bands, T mel frames, R width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.models.flow.parts import PaddedConv, time_features
from cosyexp.models.layers.attention import SelfAttention
from cosyexp.models.layers.encoder import visible_keys


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then linear, SiLU, linear."""

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(
            nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, time_B: Tensor) -> Tensor:
        return self.time_mlp(time_features(time_B, self.width))


class PositionEmbedding(nn.Module):
    """Two causal grouped convolutions, which tell frames what is before them."""

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            PaddedConv(channels, channels, kernel, left=kernel - 1, groups=groups), nn.Mish()
        )
        self.conv2 = nn.Sequential(
            PaddedConv(channels, channels, kernel, left=kernel - 1, groups=groups), nn.Mish()
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.conv2(self.conv1(x_BTC.transpose(1, 2))).transpose(1, 2)


class InputEmbedding(nn.Module):
    """Noisy mel, prompt, mu and speaker to channels."""

    def __init__(self, mel_bins: int, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * mel_bins, channels)
        self.conv_pos_embed = PositionEmbedding(channels, kernel, groups)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.proj(x_BTC)
        return x_BTC + self.conv_pos_embed(x_BTC)


class RotaryPositions(nn.Module):
    """The angles of positions, (T, R): each of R / 2 frequencies twice. The buffer is a key of the official checkpoints; it is
    not read, as positions need full precision also where the module has less."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.register_buffer(
            "inv_freq", 1 / 10000.0 ** (torch.arange(0, head_width, 2).float() / head_width)
        )

    def forward(self, frames: int) -> Tensor:
        channels = torch.arange(0, self.head_width, 2, device=self.inv_freq.device).float()
        places = torch.arange(frames, device=self.inv_freq.device).float()
        return (places.unsqueeze(1) / 10000.0 ** (channels / self.head_width)).repeat_interleave(
            2, dim=-1
        )


class AdaptiveNorm(nn.Module):
    """Layer norm without weights of its own; `linear` makes scales, shifts and gates from the embedded time."""

    def __init__(self, channels: int, vectors: int) -> None:
        super().__init__()
        self.channels, self.vectors = channels, vectors
        self.linear = nn.Linear(channels, vectors * channels)

    def forward(self, time_BC: Tensor) -> Tensor:
        """The vectors, (vectors, B, 1, C)."""
        return (
            self.linear(functional.silu(time_BC))
            .unflatten(-1, (self.vectors, 1, self.channels))
            .transpose(0, 1)
        )


def modulated(x_BTC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    return functional.layer_norm(x_BTC, x_BTC.shape[-1:], eps=1e-6) * (1 + scale_B1C) + shift_B1C


class FeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh")),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.ff(x_BTC)


class DiTBlock(nn.Module):
    """Attention and feed-forward, their inputs scaled and shifted and their outputs gated by the time (adaLN-Zero)."""

    def __init__(
        self, channels: int, heads: int, head_width: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.attn_norm = AdaptiveNorm(channels, 6)
        self.attn = SelfAttention(channels, heads, head_width, dropout, bias=True)
        self.ff = FeedForward(channels, hidden, dropout)

    def forward(
        self, x_BTC: Tensor, time_BC: Tensor, valid_BT1: Tensor, visible: Tensor, angles_TR: Tensor
    ) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.attn_norm(time_BC).unbind(0)
        x_BTC = x_BTC + gate * (
            self.attn(modulated(x_BTC, shift, scale), visible, angles_TR) * valid_BT1
        )
        return x_BTC + ff_gate * self.ff(modulated(x_BTC, ff_shift, ff_scale))


class DiT(nn.Module):
    """Velocity of the flow at time t, from the noisy mel and its conditions.

    mel_bins: F; the input is [noisy mel, prompt, mu, speaker], 4 F channels.
    width (channels), blocks, heads, head_width, hidden (feed-forward): sizes. kernel, groups: of the position embedding.
    chunk: frames that a streaming row sees at once.
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
        chunk: int = 0,
        dropout: float = 0.1,
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
    ) -> Tensor:
        """mask: 1 on the valid frames of each row. Returns the velocity (B, F, T); on padding it has no meaning."""
        speaker = spks_BF.unsqueeze(-1).expand(-1, -1, x_BFT.size(-1))
        x = self.input_embed(torch.cat([x_BFT, cond_BFT, mu_BFT, speaker], dim=1).transpose(1, 2))
        time, angles = self.time_embed(t_B), self.rotary_embed(x_BFT.size(-1))
        visible = visible_keys(mask_B1T[:, 0] > 0, self.chunk, streaming_B)
        for block in self.transformer_blocks:
            x = block(x, time, mask_B1T.transpose(1, 2), visible, angles)
        scale, shift = self.norm_out(time).unbind(0)
        return self.proj_out(modulated(x, shift, scale)).transpose(1, 2)
