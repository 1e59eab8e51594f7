"""Layers that several flow networks share.

A causal network can continue a sequence whose earlier frames it has seen. `past` is what it keeps
of them, as two queues in the order in which layers read them: the last frames that each causal
convolution reads, and the keys and values of each attention. A layer takes its tensor from the
front and puts the one for the next call at the end.

B batch, C channels, D width, T frames or tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.models.layers.attention import SelfAttention


class PaddedConv(nn.Conv1d):
    """A 1D convolution with zero padding on either side, causal if it is only on the left.

    Mirrors `CausalConv1d` of the original CosyVoice.

    Args:
        channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Kernel size in frames.
        left: Zeros on the left; with kernel - 1 of them, the convolution is causal.
        right: Zeros on the right, the number of frames of look-ahead.
        groups: Number of groups of channels.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        *,
        left: int = 0,
        right: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(channels, out_channels, kernel, groups=groups)
        self.sides = (left, right)

    def forward(self, x_BCT: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        """Pads and convolves `x`; with `past`, the frames before take the place of the zeros."""
        if past is None:
            x_BCT = functional.pad(x_BCT, self.sides)
        else:
            x_BCT = torch.cat([past[0].pop(0), x_BCT], dim=2)
            past[0].append(x_BCT[:, :, x_BCT.size(2) - self.sides[0] :])
        return functional.conv1d(x_BCT, self.weight, self.bias, groups=self.groups)


class CenteredConv(nn.Conv1d):
    """A 1D convolution that sees as far on either side; `past` is for causal ones only."""

    def forward(self, x_BCT: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        """Convolves `x`."""
        return self._conv_forward(x_BCT, self.weight, self.bias)


def nothing_past(network: nn.Module, batch: int) -> list[list[Tensor]]:
    """Returns the `past` of a causal network before its first frame."""
    like = next(network.parameters())
    convolutions = [
        like.new_zeros(batch, layer.in_channels, layer.sides[0])
        for layer in network.modules()
        if isinstance(layer, PaddedConv)
    ]
    attentions = [
        like.new_zeros(batch, layer.heads, 0, 2 * layer.to_k.out_features // layer.heads)
        for layer in network.modules()
        if isinstance(layer, SelfAttention)
    ]
    return [convolutions, attentions]


def frames_past(past: list[list[Tensor]] | None) -> int:
    """Returns the number of frames before those of this call."""
    return 0 if past is None else past[1][0].size(2)


class LookAhead(nn.Module):
    """Adds the next tokens to each token (Du et al. 2024, "CosyVoice 2", section 2.4).

    A residual branch of two convolutions: the first one reads the next tokens, the second one is
    causal. Mirrors `PreLookaheadLayer` of the original CosyVoice.

    Args:
        width: D.
        hidden: Channels between the convolutions.
        tokens: Number of tokens of look-ahead.
    """

    def __init__(self, width: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.conv1 = PaddedConv(width, hidden, tokens + 1, right=tokens)
        self.conv2 = PaddedConv(hidden, width, 3, left=2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the tokens with their look-ahead, (B, T, D)."""
        hidden_BCT = functional.leaky_relu(self.conv1(x_BTD.transpose(1, 2)))
        return x_BTD + self.conv2(hidden_BCT).transpose(1, 2)


def time_features(time_B: Tensor, width: int) -> Tensor:
    """Returns sinusoidal features of the flow's time, as in Matcha-TTS (Mehta et al. 2024).

    Args:
        time_B: The time in [0, 1].
        width: Number of features.

    Returns:
        Sines, then cosines, of 1000 t at frequencies from 1 down to 1e-4, (B, width).
    """
    half = width // 2
    step = -math.log(10000.0) / (half - 1)
    exponents = torch.arange(half, dtype=torch.float32, device=time_B.device) * step
    angles = 1000.0 * time_B.unsqueeze(1) * torch.exp(exponents).unsqueeze(0).to(time_B.dtype)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
