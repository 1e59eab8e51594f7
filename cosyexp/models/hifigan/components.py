"""The part of a vocoder that is exported: the whole generator. B batch, F mel bands, T mel frames, S samples, H harmonics."""

import math

import torch
from torch import Tensor, nn

from cosyexp.models.hifigan.generator import HiFTGenerator


class Vocoder(nn.Module):
    """Mel and the source's draws to a wave; S = T * hop."""

    inputs = ("mel", "phase", "noise")
    outputs = ("wave",)
    dynamic = {"mel": {2: "T"}, "noise": {2: "S"}, "wave": {1: "S"}}

    def __init__(self, network: HiFTGenerator) -> None:
        super().__init__()
        self.network = network

    def forward(self, mel_BFT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> Tensor:
        return self.network(mel_BFT, phase_BH, noise_BHS)[0]

    def example(self, size: int, draw: torch.Generator) -> tuple[Tensor, ...]:
        source, mel_bins = self.network.m_source, self.network.conv_pre.in_channels
        phase = (torch.rand(1, source.harmonics, generator=draw) * 2 - 1) * math.pi
        noise = torch.randn(1, source.harmonics, size * source.hop, generator=draw)
        return torch.randn(1, mel_bins, size, generator=draw) * 2 - 5, phase, noise
