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
    dynamic = {"token": {1: "N"}, "noise": {2: "T"}, "mu": {2: "T"}}

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_BN: Tensor, speaker_BE: Tensor, noise_BFT: Tensor) -> tuple[Tensor, Tensor]:
        batch, frames = token_BN.size(0), noise_BFT.size(2)
        token_lens = torch.full((batch,), token_BN.size(1), device=token_BN.device)
        mel_lens = torch.full((batch,), frames, device=token_BN.device)
        nothing = torch.zeros_like(mel_lens)
        return self.network.encode(token_BN, token_lens, speaker_BE, frames, mel_lens, None, (nothing, nothing))

    def example(self, size: int, draw: torch.Generator) -> tuple[Tensor, ...]:
        tokens = torch.randint(self.network.input_embedding.num_embeddings, (1, size), generator=draw)
        speaker = torch.randn(1, self.network.spk_embed_affine_layer.in_features, generator=draw)
        return tokens, speaker, torch.randn(1, self.network.spk_embed_affine_layer.out_features, 2 * size, generator=draw)


class Velocity(nn.Module):
    """The estimator, with the inputs and the output that the original exports."""

    inputs = ("x", "mask", "mu", "t", "spks", "cond")
    outputs = ("estimator_out",)
    dynamic = {name: {0: "B", 2: "T"} for name in ("x", "mask", "mu", "cond", "estimator_out")} | {"t": {0: "B"}, "spks": {0: "B"}}

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.estimator = network.decoder.estimator
        self.mel_bins = network.spk_embed_affine_layer.out_features

    def forward(self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        return self.estimator(x, mask, mu, t, spks, cond)

    def example(self, size: int, draw: torch.Generator) -> tuple[Tensor, ...]:
        x, mu, cond = torch.randn(3, 2, self.mel_bins, size, generator=draw)
        spks = torch.randn(2, self.mel_bins, generator=draw)
        return x, torch.ones(2, 1, size), mu, torch.rand(2, generator=draw), spks, cond
