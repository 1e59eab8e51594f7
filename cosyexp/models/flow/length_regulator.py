"""Resampling of encoded speech tokens to the rate of mel frames, for the v1 flow.

B batch, F mel bands, N tokens, T mel frames, P parts of a row.
"""

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import valid_mask
from cosyexp.models.layers.norm import MaskedGroupNorm


def stretch(x_BFN: Tensor, tokens_BP: Tensor, frames_BP: Tensor, frames: int) -> Tensor:
    """Interpolates each part of each row linearly from its tokens to its frames.

    Each part equals `interpolate(mode="linear", align_corners=False)` of that part alone.

    Args:
        x_BFN: Encoded tokens.
        tokens_BP: Number of tokens of each part; the parts of a row follow each other.
        frames_BP: Number of frames of each part.
        frames: T, the number of frames of the output.

    Returns:
        The interpolated rows, (B, F, T); undefined after the last part of a row.
    """
    ends_BP = frames_BP.cumsum(1)
    frame_T = torch.arange(frames, device=x_BFN.device)
    part_BT = (frame_T.unsqueeze(1) >= ends_BP[:, None, :-1]).sum(2)
    # The first token of the part in the row, and the last one within the part.
    first_BT = (tokens_BP.cumsum(1) - tokens_BP).gather(1, part_BT)
    last_BT = tokens_BP.gather(1, part_BT) - 1
    ratio_BT = (tokens_BP / frames_BP).gather(1, part_BT)
    # The position of each frame within the part, in tokens.
    place_BT = (frame_T - (ends_BP - frames_BP).gather(1, part_BT) + 0.5) * ratio_BT - 0.5
    place_BT = torch.minimum(place_BT.clamp(min=0), last_BT.to(place_BT.dtype))
    left_BT = place_BT.floor()
    right_BT = torch.minimum(left_BT + 1, last_BT.to(place_BT.dtype))
    left_index = (first_BT + left_BT.long()).unsqueeze(1).expand(-1, x_BFN.size(1), -1)
    right_index = (first_BT + right_BT.long()).unsqueeze(1).expand(-1, x_BFN.size(1), -1)
    weight = (place_BT - left_BT).unsqueeze(1).to(x_BFN.dtype)
    return torch.lerp(x_BFN.gather(2, left_index), x_BFN.gather(2, right_index), weight)


class LengthRegulator(nn.Module):
    """Interpolates encoded tokens to mel frames and smooths them by convolutions.

    Mirrors `InterpolateRegulator` of the original CosyVoice (Du et al. 2024, "CosyVoice").

    Args:
        channels: Number of channels.
        layers: Number of smoothing layers (convolution, group norm, Mish).
        edge_tokens: In synthesis, this many tokens at either end of a long utterance are
            interpolated apart from its middle, so that consecutive pieces of a stream overlap by a
            fixed number of frames; 0 interpolates utterances as a whole.
        edge_frames: Number of frames of `edge_tokens` tokens.
        padding: "own" keeps the rows of a batch independent; "original" interpolates a row together
            with its padding, as the original does.
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
        self.include_padding = padding == "original"

    def parts(
        self, tokens_B: Tensor, frames_B: Tensor, prompt_tokens_B: Tensor, prompt_frames_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Splits rows into the parts that synthesis interpolates separately.

        These are the prompt, and head, middle and tail of what follows it. Head and tail are empty
        where no more than 2 * `edge_tokens` tokens follow.

        Args:
            tokens_B: Number of tokens, with the prompt.
            frames_B: Number of frames, with the prompt.
            prompt_tokens_B: Number of tokens of the prompt.
            prompt_frames_B: Number of frames of the prompt.

        Returns:
            The number of tokens and the number of frames of each part, (B, 4) each.
        """
        tokens_B, frames_B = tokens_B - prompt_tokens_B, frames_B - prompt_frames_B
        cut_B = (tokens_B > 2 * self.edge_tokens).to(tokens_B.dtype)
        edge_tokens_B, edge_frames_B = cut_B * self.edge_tokens, cut_B * self.edge_frames
        tokens = [prompt_tokens_B, edge_tokens_B, tokens_B - 2 * edge_tokens_B, edge_tokens_B]
        frames = [prompt_frames_B, edge_frames_B, frames_B - 2 * edge_frames_B, edge_frames_B]
        return torch.stack(tokens, dim=1), torch.stack(frames, dim=1)

    def forward(self, x_BFN: Tensor, tokens_BP: Tensor, frames_BP: Tensor, frames: int) -> Tensor:
        """Interpolates and smooths rows; see `stretch` for the arguments.

        Returns:
            The hidden frames, (B, F, T), 0 on padding.
        """
        mask = valid_mask(frames_BP.sum(1), frames).unsqueeze(1).to(x_BFN.dtype)
        counted = mask
        if self.include_padding:
            # The last part of each row takes the padding: tokens up to N, frames up to T.
            last_tokens = x_BFN.size(2) - tokens_BP[:, :-1].sum(1, keepdim=True)
            last_frames = frames - frames_BP[:, :-1].sum(1, keepdim=True)
            tokens_BP = torch.cat([tokens_BP[:, :-1], last_tokens], dim=1)
            frames_BP = torch.cat([frames_BP[:, :-1], last_frames], dim=1)
            counted = torch.ones_like(mask)
        x = stretch(x_BFN, tokens_BP, frames_BP, frames)
        for layer in self.model:
            x = layer(x, counted) if isinstance(layer, MaskedGroupNorm) else layer(x * counted)
        return x * mask
