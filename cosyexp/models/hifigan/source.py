"""The excitation of the vocoder: harmonics of the fundamental, and noise (Wang et al. 2019, neural source-filter, section II-B).

B batch, H harmonics (the fundamental among them), T mel frames, S samples.
"""

import math

import torch
from torch import Tensor, nn


class HarmonicSource(nn.Module):
    """Sines of the harmonics of F0, merged by one linear layer and tanh.

    harmonics: H, the fundamental included. hop: samples in a mel frame.
    amplitude, noise_std: of the sines, and of the noise where the frame is voiced (elsewhere a third of the amplitude).
    voiced_above: a frame is voiced where its F0 is above this, in Hz.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        hop: int,
        harmonics: int = 9,
        amplitude: float = 0.1,
        noise_std: float = 0.003,
        voiced_above: float = 10.0,
    ) -> None:
        super().__init__()
        self.sample_rate, self.hop, self.harmonics = sample_rate, hop, harmonics
        self.amplitude, self.noise_std, self.voiced_above = amplitude, noise_std, voiced_above
        self.l_linear = nn.Linear(harmonics, 1)

    def forward(self, f0_BT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> Tensor:
        """F0 in Hz, starting phases in radians (0 for the fundamental), standard normal noise; returns (B, 1, S), S = T * hop."""
        with torch.no_grad():  # as the original: F0 learns from its own loss alone
            sines = self.sines(f0_BT, phase_BH, noise_BHS)
        return torch.tanh(self.l_linear(sines.transpose(1, 2))).transpose(1, 2)

    def sines(self, f0_BT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> Tensor:
        """The harmonics with noise, (B, H, S). F0 holds over a frame, so phases add up over frames and run on within one."""
        order = torch.arange(1, self.harmonics + 1, dtype=torch.float32, device=f0_BT.device)
        turns_BHT = f0_BT.float().unsqueeze(1) * order.unsqueeze(1) / self.sample_rate  # of a circle, in one sample
        turned_BHT = torch.cumsum((turns_BHT * self.hop) % 1.0, dim=2) - (turns_BHT * self.hop) % 1.0
        step = torch.arange(1, self.hop + 1, dtype=torch.float32, device=f0_BT.device)
        circle = (turned_BHT.unsqueeze(3) + turns_BHT.unsqueeze(3) * step) % 1.0
        sines = self.amplitude * torch.sin(2 * math.pi * circle.flatten(2) + phase_BH.unsqueeze(2))
        voiced = (f0_BT > self.voiced_above).unsqueeze(1).to(sines.dtype).repeat_interleave(self.hop, dim=2)
        spread = voiced * self.noise_std + (1 - voiced) * self.amplitude / 3
        return sines * voiced + spread * noise_BHS
