"""Normalization layers for padded rows. B batch, C channels, T frames."""

import torch
from torch import Tensor, nn


class MaskedGroupNorm(nn.Module):
    """Group norm (Wu & He 2018) with statistics over valid frames only.

    The output of a row does not depend on how much the batch pads it. With a mask of ones it equals
    `nn.GroupNorm`, which is what ONNX and pt2 exports contain, since the official runtime passes
    masks of ones.

    Args:
        groups: Number of groups; must divide `channels`.
        channels: C.
        eps: Added to the variance.

    Raises:
        ValueError: `channels` is not a multiple of `groups`.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels={channels} must be a multiple of groups={groups}")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor) -> Tensor:
        """Normalizes `x`; the mask is 1 on the frames that count and 0 elsewhere."""
        # TorchScript skips this branch without compiling it, as long as the two ifs stay nested.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if torch.compiler.is_exporting():
                return nn.functional.group_norm(
                    x_BCT, self.groups, self.weight, self.bias, self.eps
                )
        x = x_BCT.unflatten(1, (self.groups, -1))
        mask = mask_B1T.unsqueeze(1).to(x.dtype)
        count = mask.sum(dim=(2, 3), keepdim=True) * x.size(2)
        mean = (x * mask).sum(dim=(2, 3), keepdim=True) / count
        centered = x - mean
        variance = (centered.square() * mask).sum(dim=(2, 3), keepdim=True) / count
        normed = (centered * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return normed * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)


class FrameNorm(nn.Module):
    """Layer norm (Ba et al. 2016) over the channels of each frame, as in the causal U-Net.

    Frames are normalized independently, so the mask is not needed; `forward` takes one to be
    interchangeable with `MaskedGroupNorm`.

    Args:
        channels: C.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor) -> Tensor:
        """Normalizes `x` and ignores the mask."""
        normed = nn.functional.layer_norm(
            x_BCT.transpose(1, 2), self.weight.shape, self.weight, self.bias, self.eps
        )
        return normed.transpose(1, 2)
