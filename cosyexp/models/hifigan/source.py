"""The excitation of the vocoder: harmonics of the fundamental, and noise (Wang et al. 2019, neural source-filter, section II-B).

B batch, H harmonics (the fundamental among them), T mel frames, S samples, N samples in a mel frame.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

GLIDES = ("running", "linear", "nearest")


class HarmonicSource(nn.Module):
    """Sines of the harmonics of F0, merged by one linear layer and tanh.

    harmonics: H, the fundamental included. hop: N.
    amplitude, noise_std: of the sines, and of the noise where the frame is voiced (elsewhere a third of the amplitude).
    voiced_above: a frame is voiced where its F0 is above this, in Hz.
    glide: how phases move within a frame. "running": on and on, from their random starts. "linear": evenly from the middle of a frame
        to the middle of the next. "nearest": not at all. For the last two random starts are without effect, as in the original.
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
        glide: str = "running",
    ) -> None:
        super().__init__()
        if glide not in GLIDES:
            raise ValueError(f"glide={glide} is none of {', '.join(GLIDES)}")
        self.sample_rate, self.hop, self.harmonics, self.glide = sample_rate, hop, harmonics, glide
        self.amplitude, self.noise_std, self.voiced_above = amplitude, noise_std, voiced_above
        self.l_linear = nn.Linear(harmonics, 1)

    def forward(self, f0_BT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> Tensor:
        """F0 in Hz, starting phases in radians (0 for the fundamental), standard normal noise; returns (B, 1, S), S = T * N."""
        with torch.no_grad():  # as the original: F0 learns from its own loss alone
            sines = self.sines(f0_BT, phase_BH, noise_BHS)
        return torch.tanh(self.l_linear(sines.transpose(1, 2))).transpose(1, 2)

    def sines(self, f0_BT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> Tensor:
        """The harmonics with noise, (B, H, S). Phases add up over frames in double precision, modulo one turn."""
        dtype = torch.float64 if f0_BT.dtype == torch.float64 else torch.float32
        order = torch.arange(1, self.harmonics + 1, dtype=torch.float64, device=f0_BT.device)
        turns_BHT = (
            f0_BT.double().unsqueeze(1) * order.unsqueeze(1) / self.sample_rate
        ) % 1.0  # of a circle, in one sample
        turned_BHT = (
            torch.cumsum((turns_BHT * self.hop) % 1.0, dim=2) % 1.0
        )  # in all frames up to this one
        circle_BHTN = turned_BHT.to(dtype).unsqueeze(3) + self.within(turns_BHT.to(dtype), phase_BH)
        sines = self.amplitude * torch.sin(2 * math.pi * (circle_BHTN % 1.0).flatten(2))
        voiced = (
            (f0_BT > self.voiced_above).unsqueeze(1).to(dtype).repeat_interleave(self.hop, dim=2)
        )
        spread = voiced * self.noise_std + (1 - voiced) * self.amplitude / 3
        return sines * voiced + spread * noise_BHS

    def within(self, turns_BHT: Tensor, phase_BH: Tensor) -> Tensor:
        """What the samples of a frame are ahead of it, in turns, (B, H, T, N)."""
        steps = torch.arange(self.hop, dtype=turns_BHT.dtype, device=turns_BHT.device)
        if self.glide == "running":
            return turns_BHT.unsqueeze(3) * (steps + 1 - self.hop) + phase_BH[:, :, None, None] / (
                2 * math.pi
            )
        if self.glide == "linear":
            offset, inner = steps - (self.hop - 1) / 2, turns_BHT[:, :, 1:]
            arriving, leaving = (
                functional.pad(inner, (1, 0)).unsqueeze(3),
                functional.pad(inner, (0, 1)).unsqueeze(3),
            )
            return arriving * offset.clamp(max=0) + leaving * offset.clamp(min=0)
        return turns_BHT.unsqueeze(3) * torch.zeros_like(steps)
