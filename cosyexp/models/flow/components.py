"""The parts of a flow model that are exported: the conditions once, then the velocity at every Euler step.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames.
"""

import torch
from torch import Tensor, nn

from cosyexp.models.flow.masked_diff import FlowNetwork


class Conditions(nn.Module):
    """Tokens and speaker to the conditions of the velocity, for as many frames as the noise has."""

    inputs = ("token", "speaker", "noise")
    outputs = ("mu", "spks")
    dynamic = {
        "token": {0: "B", 1: "N"},
        "speaker": {0: "B"},
        "noise": {0: "B", 2: "T"},
        "mu": {0: "B", 2: "T"},
        "spks": {0: "B"},
    }

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, token_BN: Tensor, speaker_BE: Tensor, noise_BFT: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, frames = token_BN.size(0), noise_BFT.size(2)
        token_lens = torch.full((batch,), token_BN.size(1), device=token_BN.device)
        mel_lens = torch.full((batch,), frames, device=token_BN.device)
        nothing = torch.zeros_like(mel_lens)
        return self.network.encode(
            token_BN, token_lens, speaker_BE, frames, mel_lens, None, (nothing, nothing)
        )

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        tokens = torch.randint(
            self.network.input_embedding.num_embeddings, (batch, size), generator=draw
        )
        speaker = torch.randn(
            batch, self.network.spk_embed_affine_layer.in_features, generator=draw
        )
        return (
            tokens,
            speaker,
            torch.randn(
                batch, self.network.spk_embed_affine_layer.out_features, 2 * size, generator=draw
            ),
        )


class UpsampledConditions(Conditions):
    """The same for the v2 encoder, which makes two frames of a token, but none of the last tokens of an unfinished utterance."""

    dynamic = {**Conditions.dynamic, "noise": {0: "B", 2: "2*N"}, "mu": {0: "B", 2: "2*N"}}


class Velocity(nn.Module):
    """The estimator, with the inputs and the output that the original exports."""

    inputs = ("x", "mask", "mu", "t", "spks", "cond")
    outputs = ("estimator_out",)
    dynamic = {name: {0: "B", 2: "T"} for name in ("x", "mask", "mu", "cond", "estimator_out")} | {
        "t": {0: "B"},
        "spks": {0: "B"},
    }

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.estimator = network.decoder.estimator
        self.mel_bins = network.spk_embed_affine_layer.out_features

    def forward(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        return self.estimator(x, mask, mu, t, spks, cond)

    def example(self, size: int, draw: torch.Generator, batch: int = 2) -> tuple[Tensor, ...]:
        x, mu, cond = torch.randn(3, batch, self.mel_bins, size, generator=draw)
        spks = torch.randn(batch, self.mel_bins, generator=draw)
        return x, torch.ones(batch, 1, size), mu, torch.rand(batch, generator=draw), spks, cond


class StreamingVelocity(Velocity):
    """The same for a stream: every frame sees the future up to the end of its chunk."""

    def forward(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        return self.estimator(x, mask, mu, t, spks, cond, torch.ones_like(t) > 0)
