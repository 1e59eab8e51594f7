"""From the rate of speech tokens to the rate of mel frames. B batch, F mel bands, N tokens, T mel frames."""

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import valid_mask
from cosyexp.models.layers.norm import MaskedGroupNorm


def stretch(x_BFN: Tensor, lengths_B: Tensor, frames: int, frames_B: Tensor) -> Tensor:
    """Linear interpolation of each row from its own length to its own number of frames; (B, F, frames).

    A row alone equals `interpolate(mode="linear", align_corners=False)` of it; what is behind its frames has no meaning.
    """
    ratio = (lengths_B / frames_B).unsqueeze(1)
    place = (torch.arange(frames, device=x_BFN.device) + 0.5) * ratio - 0.5
    place = torch.minimum(place.clamp(min=0), (lengths_B - 1).unsqueeze(1).to(place.dtype))
    left = place.floor()
    right = torch.minimum(left + 1, (lengths_B - 1).unsqueeze(1).to(place.dtype))
    weight = (place - left).unsqueeze(1).to(x_BFN.dtype)
    at_left = x_BFN.gather(2, left.long().unsqueeze(1).expand(-1, x_BFN.size(1), -1))
    at_right = x_BFN.gather(2, right.long().unsqueeze(1).expand(-1, x_BFN.size(1), -1))
    return torch.lerp(at_left, at_right, weight)


class LengthRegulator(nn.Module):
    """Stretches encoded tokens to mel frames, then smooths them by convolutions."""

    def __init__(self, *, channels: int, layers: int, padding: str = "own") -> None:
        super().__init__()
        self.model = nn.ModuleList()
        for _ in range(layers):
            self.model.extend([nn.Conv1d(channels, channels, 3, padding=1), MaskedGroupNorm(1, channels), nn.Mish()])
        self.model.append(nn.Conv1d(channels, channels, 1))
        self.whole_rows = padding == "original"

    def forward(self, x_BFN: Tensor, lengths_B: Tensor, frames: int, frames_B: Tensor) -> Tensor:
        """Returns (B, F, frames), 0 behind each row's `frames_B`."""
        mask = valid_mask(frames_B, frames).unsqueeze(1).to(x_BFN.dtype)
        inner = mask
        if self.whole_rows:  # as the original: a row is stretched with its padding
            lengths_B = torch.full_like(lengths_B, x_BFN.size(2))
            frames_B = torch.full_like(frames_B, frames)
            inner = torch.ones_like(mask)
        x = stretch(x_BFN, lengths_B, frames, frames_B)
        for layer in self.model:
            x = layer(x, inner) if isinstance(layer, MaskedGroupNorm) else layer(x * inner)
        return x * mask
