"""Layers that several flow networks share.

B batch, C channels, D width, T frames or tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


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

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Pads and convolves `x`."""
        return functional.conv1d(
            functional.pad(x_BCT, self.sides), self.weight, self.bias, groups=self.groups
        )


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
