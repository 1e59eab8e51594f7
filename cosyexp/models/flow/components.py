"""Components of a flow model that are exported: its conditions, and the velocity of an Euler step.

Class attributes follow the protocol `Component` in `cosyexp/exporting/components.py`.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames.
"""

import torch
from torch import Tensor, nn

from cosyexp.models.flow.masked_diff import FlowNetwork
from cosyexp.registry import register


@register("component")
class Conditions(nn.Module):
    """Computes the conditions of the velocity once per utterance (Du et al. 2024, "CosyVoice").

    Args:
        network: The flow model.
    """

    inputs: tuple[str, ...] = ("token", "speaker", "noise", "prompt_token_lens", "prompt_mel_lens")
    outputs = ("mu", "spks")
    dynamic = {
        "token": {0: "batch", 1: "token_len"},
        "speaker": {0: "batch"},
        "noise": {0: "batch", 2: "frames"},
        "prompt_token_lens": {0: "batch"},
        "prompt_mel_lens": {0: "batch"},
        "mu": {0: "batch", 2: "frames"},
        "spks": {0: "batch"},
    }

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        token_BN: Tensor,
        speaker_BE: Tensor,
        noise_BFT: Tensor,
        prompt_tokens_B: Tensor,
        prompt_frames_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Encodes tokens and speaker; no row may be padded.

        Args:
            token_BN: Speech tokens, those of the prompt first.
            speaker_BE: Speaker embeddings.
            noise_BFT: The noise of synthesis; only its number of frames is used.
            prompt_tokens_B: Number of tokens of the prompt.
            prompt_frames_B: Number of frames of the prompt.

        Returns:
            mu (B, F, T), and the projected speaker embedding (B, F).
        """
        batch, frames = token_BN.size(0), noise_BFT.size(2)
        token_lens = torch.full((batch,), token_BN.size(1), device=token_BN.device)
        mel_lens = torch.full((batch,), frames, device=token_BN.device)
        prompt_lens = (prompt_tokens_B, prompt_frames_B)
        return self.network.encode(
            token_BN, token_lens, speaker_BE, frames, mel_lens, None, prompt_lens
        )

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `size` tokens and twice as many frames for each row."""
        vocabulary = self.network.input_embedding.num_embeddings
        projection = self.network.spk_embed_affine_layer
        tokens = torch.randint(vocabulary, (batch, size), generator=draw)
        speaker = torch.randn(batch, projection.in_features, generator=draw)
        noise = torch.randn(batch, projection.out_features, 2 * size, generator=draw)
        prompts = torch.randint((size + 1) // 2, (batch,), generator=draw)
        return tokens, speaker, noise, prompts, 2 * prompts


@register("component")
class FixedConditions(Conditions):
    """Conditions of a v2 or v3 flow, with a fixed number of frames per token.

    The tokens of a prompt are encoded as the others are (Du et al. 2024, "CosyVoice 2"). The last
    tokens of an unfinished utterance have no frames: they serve as look-ahead only.
    """

    inputs = ("token", "speaker", "noise")

    def forward(  # type: ignore[override]
        self, token_BN: Tensor, speaker_BE: Tensor, noise_BFT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes tokens and speaker; see `Conditions.forward`."""
        batch, frames = token_BN.size(0), noise_BFT.size(2)
        token_lens = torch.full((batch,), token_BN.size(1), device=token_BN.device)
        mel_lens = torch.full((batch,), frames, device=token_BN.device)
        return self.network.encode(token_BN, token_lens, speaker_BE, frames, mel_lens)

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `size` tokens and twice as many frames for each row."""
        return super().example(size, draw, batch)[:3]


@register("component")
class UpsampledConditions(FixedConditions):
    """Conditions of a v2 flow, whose encoder upsamples (Du et al. 2024, "CosyVoice 2").

    T is at most 2N.
    """

    tied = {"frames": (2, "token_len")}


@register("component")
class Velocity(nn.Module):
    """The velocity estimator, with the inputs and the output of the original's ONNX file.

    Mirrors `flow.decoder.estimator.fp32.onnx` of the original CosyVoice.

    Args:
        network: The flow model.
    """

    inputs = ("x", "mask", "mu", "t", "spks", "cond")
    outputs = ("estimator_out",)
    dynamic = {
        name: {0: "batch", 2: "seq_len"} for name in ("x", "mask", "mu", "cond", "estimator_out")
    } | {
        "t": {0: "batch"},
        "spks": {0: "batch"},
    }

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.estimator = network.decoder.estimator
        self.mel_bins = network.spk_embed_affine_layer.out_features

    def forward(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        """Estimates the velocity.

        Args:
            x: The noisy mel, (B, F, T).
            mask: 1 on valid frames, 0 on padding, (B, 1, T).
            mu: The encoded tokens, (B, F, T).
            t: The time in [0, 1], (B,).
            spks: The projected speaker embedding, (B, F).
            cond: The mel of the prompt, 0 after it, (B, F, T).

        Returns:
            The velocity, (B, F, T).
        """
        return self.estimator(x, mask, mu, t, spks, cond)

    def example(self, size: int, draw: torch.Generator, batch: int = 2) -> tuple[Tensor, ...]:
        """Returns random inputs: `batch` rows of `size` frames, without padding."""
        x, mu, cond = torch.randn(3, batch, self.mel_bins, size, generator=draw)
        spks = torch.randn(batch, self.mel_bins, generator=draw)
        return x, torch.ones(batch, 1, size), mu, torch.rand(batch, generator=draw), spks, cond


@register("component")
class StreamingVelocity(Velocity):
    """The velocity estimator for streaming (Du et al. 2024, "CosyVoice 2", section 2.4)."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor,
        cond: Tensor,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Estimates the velocity; every frame sees no further than the end of its own chunk.

        Args:
            x, mask, mu, t, spks, cond: See `Velocity.forward`.
            past: What the network kept of the frames before, see `parts.py`; None if these are all
                the frames.

        Returns:
            The velocity, (B, F, T).
        """
        return self.estimator(x, mask, mu, t, spks, cond, torch.ones_like(t) > 0, past)
