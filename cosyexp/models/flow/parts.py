"""What several networks of the flow use. B batch, C channels, D width, F mel bands, T frames or tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class PaddedConv(nn.Conv1d):
    """A convolution with zeros on either side: `left` alone is causal, `right` alone looks ahead."""

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
        return functional.conv1d(
            functional.pad(x_BCT, self.sides), self.weight, self.bias, groups=self.groups
        )


class LookAhead(nn.Module):
    """Adds to each token what two convolutions make of itself, the next `tokens` ones and a few before."""

    def __init__(self, width: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.conv1 = PaddedConv(width, hidden, tokens + 1, right=tokens)
        self.conv2 = PaddedConv(hidden, width, 3, left=2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.conv2(
            functional.leaky_relu(self.conv1(x_BTD.transpose(1, 2)))
        ).transpose(1, 2)


def time_features(time_B: Tensor, width: int) -> Tensor:
    """(B, width): sines, then cosines, of 1000 t at frequencies from 1 down to 1e-4."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=time_B.device) * (
        -math.log(10000.0) / (half - 1)
    )
    angles = 1000.0 * time_B.unsqueeze(1) * torch.exp(steps).unsqueeze(0).to(time_B.dtype)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
