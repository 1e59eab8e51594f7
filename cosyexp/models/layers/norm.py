"""Norms of padded rows. B batch, C channels, T frames."""

import torch
from torch import Tensor, nn


class MaskedGroupNorm(nn.Module):
    """Group norm (Wu & He 2018) whose statistics count only the frames where the mask is 1.

    So a row's output does not depend on how far its batch pads it. With a mask of ones it is `nn.GroupNorm`, and that is what an
    exported graph has, as the official runtime gives it masks of ones.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (a script reads no further)
            if torch.compiler.is_exporting():
                return nn.functional.group_norm(
                    x_BCT, self.groups, self.weight, self.bias, self.eps
                )
        x = x_BCT.unflatten(1, (self.groups, -1))
        mask = mask_B1T.unsqueeze(1).to(x.dtype)
        count = mask.sum(dim=(2, 3), keepdim=True) * x.size(2)
        mean = (x * mask).sum(dim=(2, 3), keepdim=True) / count
        centred = x - mean
        variance = (centred.square() * mask).sum(dim=(2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return normed * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)


class FrameNorm(nn.Module):
    """Layer norm over the channels of each frame: padding has no say in it."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(
            x_BCT.transpose(1, 2), self.weight.shape, self.weight, self.bias, self.eps
        )
        return normed.transpose(1, 2)
