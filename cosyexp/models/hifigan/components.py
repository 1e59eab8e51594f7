"""The component of a vocoder that is exported: the whole generator.

Class attributes follow the protocol `Component` in `cosyexp/exporting/components.py`.

B batch, F mel bands, T mel frames, S samples (S = T * hop), H harmonics.
"""

import math

import torch
from torch import Tensor, nn

from cosyexp.models.hifigan.generator import HiFTGenerator
from cosyexp.registry import register


@register("component")
class Vocoder(nn.Module):
    """Generates waveforms from mel spectrograms (Li et al. 2023, "HiFTNet").

    Args:
        network: The generator.
    """

    inputs = ("mel", "phase", "noise")
    outputs = ("wave",)
    dynamic = {
        "mel": {0: "batch", 2: "frames"},
        "phase": {0: "batch"},
        "noise": {0: "batch", 2: "samples"},
        "wave": {0: "batch", 1: "samples"},
    }
    # The phase sums up F0 over all samples, and with it every rounding error.
    full = ("f0_predictor", "m_source", "stft")

    def __init__(self, network: HiFTGenerator) -> None:
        super().__init__()
        self.network = network

    def forward(self, mel_BFT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> Tensor:
        """Returns the waveforms, (B, S); see `HiFTGenerator.forward`."""
        return self.network(mel_BFT, phase_BH, noise_BHS)[0]

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: `batch` rows of `size` frames."""
        source, mel_bins = self.network.m_source, self.network.conv_pre.in_channels
        phase = (torch.rand(batch, source.harmonics, generator=draw) * 2 - 1) * math.pi
        noise = torch.randn(batch, source.harmonics, size * source.hop, generator=draw)
        return torch.randn(batch, mel_bins, size, generator=draw) * 2 - 5, phase, noise
