"""From the rate of speech tokens to the rate of mel frames. B batch, F mel bands, N tokens, T mel frames, P parts of a row."""

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import valid_mask
from cosyexp.models.layers.norm import MaskedGroupNorm


def stretch(x_BFN: Tensor, tokens_BP: Tensor, frames_BP: Tensor, frames: int) -> Tensor:
    """Linear interpolation of each row, part by part, from its numbers of tokens to its numbers of frames; (B, F, frames).

    A part alone equals `interpolate(mode="linear", align_corners=False)` of it; what is behind a row's frames has no meaning.
    """
    ends_BP = frames_BP.cumsum(1)
    place = torch.arange(frames, device=x_BFN.device)
    part_BT = (place.unsqueeze(1) >= ends_BP[:, None, :-1]).sum(2)
    first = (tokens_BP.cumsum(1) - tokens_BP).gather(1, part_BT)
    last = tokens_BP.gather(1, part_BT) - 1
    ratio = (tokens_BP / frames_BP).gather(1, part_BT)
    at = (place - (ends_BP - frames_BP).gather(1, part_BT) + 0.5) * ratio - 0.5
    at = torch.minimum(at.clamp(min=0), last.to(at.dtype))
    left = at.floor()
    right = torch.minimum(left + 1, last.to(at.dtype))
    at_left = x_BFN.gather(2, (first + left.long()).unsqueeze(1).expand(-1, x_BFN.size(1), -1))
    at_right = x_BFN.gather(2, (first + right.long()).unsqueeze(1).expand(-1, x_BFN.size(1), -1))
    return torch.lerp(at_left, at_right, (at - left).unsqueeze(1).to(x_BFN.dtype))


class LengthRegulator(nn.Module):
    """Stretches encoded tokens to mel frames, then smooths them by convolutions.

    edge_tokens, edge_frames: in synthesis, so many tokens at either end of a long utterance become so many frames, whatever is
        between them, so that utterances cut out of a stream fit together.
    """

    def __init__(
        self,
        *,
        channels: int,
        layers: int,
        edge_tokens: int = 0,
        edge_frames: int = 0,
        padding: str = "own",
    ) -> None:
        super().__init__()
        self.edge_tokens, self.edge_frames = edge_tokens, edge_frames
        self.model = nn.ModuleList()
        for _ in range(layers):
            self.model.extend(
                [
                    nn.Conv1d(channels, channels, 3, padding=1),
                    MaskedGroupNorm(1, channels),
                    nn.Mish(),
                ]
            )
        self.model.append(nn.Conv1d(channels, channels, 1))
        self.whole_rows = padding == "original"

    def parts(
        self, tokens_B: Tensor, frames_B: Tensor, prompt_tokens_B: Tensor, prompt_frames_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and frames (B, 4) of what synthesis stretches apart: the prompt, and of the rest the head, the middle, the tail."""
        tokens_B, frames_B = tokens_B - prompt_tokens_B, frames_B - prompt_frames_B
        cut_B = (tokens_B > 2 * self.edge_tokens).to(tokens_B.dtype)
        edge_tokens_B, edge_frames_B = cut_B * self.edge_tokens, cut_B * self.edge_frames
        tokens = [prompt_tokens_B, edge_tokens_B, tokens_B - 2 * edge_tokens_B, edge_tokens_B]
        frames = [prompt_frames_B, edge_frames_B, frames_B - 2 * edge_frames_B, edge_frames_B]
        return torch.stack(tokens, dim=1), torch.stack(frames, dim=1)

    def forward(self, x_BFN: Tensor, tokens_BP: Tensor, frames_BP: Tensor, frames: int) -> Tensor:
        """Returns (B, F, frames), 0 behind each row's frames."""
        mask = valid_mask(frames_BP.sum(1), frames).unsqueeze(1).to(x_BFN.dtype)
        inner = mask
        if self.whole_rows:  # as the original: a row's last part is stretched with its padding
            tokens_BP = torch.cat(
                [tokens_BP[:, :-1], x_BFN.size(2) - tokens_BP[:, :-1].sum(1, keepdim=True)], dim=1
            )
            frames_BP = torch.cat(
                [frames_BP[:, :-1], frames - frames_BP[:, :-1].sum(1, keepdim=True)], dim=1
            )
            inner = torch.ones_like(mask)
        x = stretch(x_BFN, tokens_BP, frames_BP, frames)
        for layer in self.model:
            x = layer(x, inner) if isinstance(layer, MaskedGroupNorm) else layer(x * inner)
        return x * mask
