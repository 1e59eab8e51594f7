"""The excitation of the vocoder: sines at the harmonics of F0, and noise.

It follows neural source-filter models (Wang et al. 2019, section II-B).

B batch, H harmonics (the fundamental included), T mel frames, S samples (S = T * N), N samples per
mel frame.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.registry import register

GLIDES = ("running", "linear", "nearest")


@register("module")
class HarmonicSource(nn.Module):
    """Harmonic-plus-noise excitation from F0 (Wang et al. 2019, "neural source-filter").

    Sines at the harmonics of F0 are mixed by a linear layer and tanh. Mirrors `SourceModuleHnNSF`
    of the original CosyVoice.

    Args:
        sample_rate: In Hz.
        hop: N.
        harmonics: H.
        amplitude: Amplitude of the sines.
        noise_std: Standard deviation of the noise in voiced frames; in unvoiced ones, it is a third
            of `amplitude`.
        voiced_above: Frames are voiced if their F0 is above this, in Hz.
        glide: How the phase moves within a frame. "running" accumulates it sample by sample from
            the starting phases (v1, `SineGen` of the original). "linear" interpolates it between
            the middles of frames (v2, `SineGen2`). "nearest" keeps it constant (v3, `SineGen2`).
            The latter two ignore the starting phases, as the original does in effect.

    Raises:
        ValueError: `glide` is unknown.
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
            raise ValueError(f"glide={glide} must be one of {', '.join(GLIDES)}")
        self.sample_rate, self.hop, self.harmonics, self.glide = sample_rate, hop, harmonics, glide
        self.amplitude, self.noise_std, self.voiced_above = amplitude, noise_std, voiced_above
        self.l_linear = nn.Linear(harmonics, 1)

    def forward(self, f0_BT: Tensor, phase_BH: Tensor, noise_BHS: Tensor, first: int = 0) -> Tensor:
        """Returns the excitation, (B, 1, S).

        No gradient flows to F0, as in the original: the F0 predictor learns from its own loss only.

        Args:
            f0_BT: F0 of each frame, in Hz.
            phase_BH: Starting phases in radians, 0 for the fundamental.
            noise_BHS: Standard normal noise.
            first: The frame that the excitation and the noise begin with; those before count in the
                phase.
        """
        with torch.no_grad():
            sines = self.sines(f0_BT, phase_BH, noise_BHS, first)
        return torch.tanh(self.l_linear(sines.transpose(1, 2))).transpose(1, 2)

    def sines(self, f0_BT: Tensor, phase_BH: Tensor, noise_BHS: Tensor, first: int = 0) -> Tensor:
        """Returns the harmonics with noise, (B, H, S); see `forward` for the arguments.

        Phases are in turns (1 is a full circle), and are summed over frames in double precision,
        modulo 1; in fp32 on MPS, which has no fp64.
        """
        wide = torch.float32 if f0_BT.device.type == "mps" else torch.float64
        dtype = torch.float64 if f0_BT.dtype == torch.float64 else torch.float32
        order = torch.arange(1, self.harmonics + 1, dtype=wide, device=f0_BT.device)
        # The phase increment of one sample.
        turns_BHT = (f0_BT.to(wide).unsqueeze(1) * order.unsqueeze(1) / self.sample_rate) % 1.0
        # The phase summed over all frames up to and including each one.
        total_BHT = torch.cumsum((turns_BHT * self.hop) % 1.0, dim=2) % 1.0
        if first > 0:  # one more frame, as a phase may glide from it
            turns_BHT, total_BHT = turns_BHT[:, :, first - 1 :], total_BHT[:, :, first - 1 :]
        phase_BHTN = total_BHT.to(dtype).unsqueeze(3) + self.within(turns_BHT.to(dtype), phase_BH)
        if first > 0:
            phase_BHTN, f0_BT = phase_BHTN[:, :, 1:], f0_BT[:, first:]
        sines = self.amplitude * torch.sin(2 * math.pi * (phase_BHTN % 1.0).flatten(2))
        voiced_B1T = (f0_BT > self.voiced_above).unsqueeze(1).to(dtype)
        voiced = voiced_B1T.repeat_interleave(self.hop, dim=2)
        noise_std = voiced * self.noise_std + (1 - voiced) * self.amplitude / 3
        return sines * voiced + noise_std * noise_BHS

    def within(self, turns_BHT: Tensor, phase_BH: Tensor) -> Tensor:
        """Returns the phase of each sample relative to the summed phase of its frame.

        Args:
            turns_BHT: Phase increment of one sample, in turns.
            phase_BH: Starting phases in radians.

        Returns:
            Relative phases in turns, (B, H, T, N).
        """
        steps = torch.arange(self.hop, dtype=turns_BHT.dtype, device=turns_BHT.device)
        if self.glide == "running":
            start_BH11 = phase_BH[:, :, None, None] / (2 * math.pi)
            return turns_BHT.unsqueeze(3) * (steps + 1 - self.hop) + start_BH11
        if self.glide == "linear":
            # The summed phase is reached in the middle of a frame: before it, the increment is that
            # of this frame, after it that of the next one, and 0 at both ends of the utterance.
            offset, inner = steps - (self.hop - 1) / 2, turns_BHT[:, :, 1:]
            before = functional.pad(inner, (1, 0)).unsqueeze(3)
            after = functional.pad(inner, (0, 1)).unsqueeze(3)
            return before * offset.clamp(max=0) + after * offset.clamp(min=0)
        return turns_BHT.unsqueeze(3) * torch.zeros_like(steps)
