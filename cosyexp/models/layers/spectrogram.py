"""Mel spectrograms, and an STFT that can be exported.

B batch, S samples, T frames, F mel bands, K frequency bins.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.registry import register

SILENCE = math.log(1e-5)  # the smallest value of a log-mel spectrogram
HALF_DTYPES = (torch.float16, torch.bfloat16)


def slaney_mel(frequency: Tensor) -> Tensor:
    """Converts Hz to mel on Slaney's scale (Slaney 1998, "Auditory Toolbox").

    The scale is linear below 1 kHz and logarithmic above.
    """
    above = 15.0 + 27.0 * torch.log(frequency.clamp(min=1000.0) / 1000.0) / math.log(6.4)
    return torch.where(frequency < 1000.0, frequency * 3.0 / 200.0, above)


def mel_filters(sample_rate: int, n_fft: int, bins: int, fmin: float, fmax: float) -> Tensor:
    """Returns triangular mel filters of equal area, evenly spaced on Slaney's scale.

    Args:
        sample_rate: In Hz.
        n_fft: FFT size in samples.
        bins: F, the number of filters.
        fmin: Lower edge of the first filter, in Hz.
        fmax: Upper edge of the last filter, in Hz.

    Returns:
        The filters, (bins, n_fft // 2 + 1), in float32.
    """
    limits = slaney_mel(torch.tensor([fmin, fmax], dtype=torch.float64))
    mels = torch.linspace(float(limits[0]), float(limits[1]), bins + 2, dtype=torch.float64)
    edges = torch.where(
        mels < 15.0, mels * 200.0 / 3.0, 1000.0 * torch.exp((mels - 15.0) * math.log(6.4) / 27.0)
    )
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).float()


@register("module")
class MelSpectrogram(nn.Module):
    """Log-mel spectrogram of the flow and the vocoder.

    Reflect padding, Hann window, magnitude, Slaney's mel scale and natural logarithm, as in
    HiFi-GAN (Kong et al. 2020) and Matcha-TTS (Mehta et al. 2024), whose function the original
    CosyVoice calls.

    Args:
        sample_rate: In Hz.
        n_fft: FFT size in samples.
        hop: Samples per frame.
        win: Window length in samples.
        bins: F, the number of mel bands.
        fmin: Lowest frequency in Hz.
        fmax: Highest frequency in Hz; None for half the sample rate.
    """

    filters: Tensor
    window: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        n_fft: int,
        hop: int,
        win: int,
        bins: int,
        fmin: float = 0.0,
        fmax: float | None = None,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop, self.win, self.bins = n_fft, hop, win, bins
        filters = mel_filters(
            sample_rate, n_fft, bins, fmin, fmax if fmax is not None else sample_rate / 2
        )
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(win), persistent=False)

    def forward(self, wave_BS: Tensor) -> Tensor:
        """Computes the log-mel spectrogram, in full precision even under autocast.

        Args:
            wave_BS: The waveforms, in [-1, 1].

        Returns:
            The spectrograms, (B, F, S // hop).
        """
        with torch.autocast(wave_BS.device.type, enabled=False):
            return self._log_mel(wave_BS.float() if wave_BS.dtype in HALF_DTYPES else wave_BS)

    def _log_mel(self, wave_BS: Tensor) -> Tensor:
        pad = (self.n_fft - self.hop) // 2
        padded = functional.pad(wave_BS.unsqueeze(1), (pad, pad), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop,
            self.win,
            self.window,
            center=False,
            normalized=False,
            return_complex=True,
        )
        magnitude = torch.view_as_real(spectrum).square().sum(-1).add(1e-9).sqrt()
        return torch.matmul(self.filters, magnitude).clamp(min=math.exp(SILENCE)).log()


class WhisperMel(nn.Module):
    """Log-mel spectrogram of Whisper, the input of the speech tokenizers (Radford et al. 2022).

    Windows of 25 ms (400 samples at 16 kHz), 10 ms (160 samples) per frame.

    Args:
        bins: F, the number of mel bands; the speech tokenizers of CosyVoice take 128.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer(
            "filters", mel_filters(16000, 400, bins, 0.0, 8000.0), persistent=False
        )
        self.register_buffer("window", torch.hann_window(400), persistent=False)

    def forward(self, wave_S: Tensor) -> Tensor:
        """Computes the spectrogram of one utterance.

        There is no batch dimension: values are clamped relative to the largest one, so padding or
        batch mates would change them.

        Args:
            wave_S: The waveform at 16 kHz.

        Returns:
            The spectrogram, (F, S // 160).
        """
        spectrum = torch.stft(wave_S, 400, 160, window=self.window, return_complex=True)[:, :-1]
        mel_FT = torch.matmul(self.filters, spectrum.abs().square()).clamp(min=1e-10).log10()
        return (torch.maximum(mel_FT, mel_FT.max() - 8.0) + 4.0) / 4.0


class ConvolutionalSTFT(nn.Module):
    """Short-time Fourier transform and its inverse, computed by convolutions.

    Gives the same numbers as `torch.stft` and `torch.istft` with a centered Hann window, which the
    original HiFT vocoder calls, in operations that every export format supports.

    Args:
        n_fft: FFT size and window length in samples.
        hop: Samples per frame.
    """

    forward_basis: Tensor
    inverse_basis: Tensor
    envelope: Tensor

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop, self.bins = n_fft, hop, n_fft // 2 + 1
        window = torch.hann_window(n_fft, dtype=torch.float64)
        bins_and_samples = torch.outer(torch.arange(self.bins), torch.arange(n_fft)).double()
        angles = bins_and_samples * (2 * math.pi / n_fft)
        basis = torch.cat([torch.cos(angles), -torch.sin(angles)])
        # The spectrum of a real signal is symmetric: all bins but the first and last count twice.
        count = torch.full((self.bins,), 2.0, dtype=torch.float64)
        count[0] = count[-1] = 1.0
        inverse = basis * torch.cat([count, count])[:, None] / n_fft
        self.register_buffer(
            "forward_basis", (basis * window).unsqueeze(1).float(), persistent=False
        )
        self.register_buffer(
            "inverse_basis", (inverse * window).unsqueeze(1).float(), persistent=False
        )
        self.register_buffer("envelope", window.square()[None, None].float(), persistent=False)

    def forward(self, wave_B1S: Tensor) -> Tensor:
        """Transforms waveforms (B, 1, S) to spectra.

        Returns:
            Real parts, then imaginary parts, (B, 2K, S // hop + 1).
        """
        padded = functional.pad(wave_B1S, (self.n_fft // 2, self.n_fft // 2), mode="reflect")
        return functional.conv1d(padded, self.forward_basis.to(padded.dtype), stride=self.hop)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Transforms spectra back to waveforms, in full precision even under autocast.

        The windowed frames are overlapped, added, and divided by the sum of squared windows
        (Griffin & Lim 1984).

        Args:
            spectrum: Real parts, then imaginary parts, (B, 2K, T).

        Returns:
            The waveforms, (B, (T - 1) * hop).
        """
        # TorchScript does not support autocast. It skips this branch without compiling it, as long
        # as the two ifs stay nested.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if torch.is_autocast_enabled(spectrum.device.type):
                with torch.autocast(spectrum.device.type, enabled=False):
                    return self._overlap_add(spectrum.float())
        return self._overlap_add(spectrum)

    def _overlap_add(self, spectrum: Tensor) -> Tensor:
        wave = functional.conv_transpose1d(
            spectrum, self.inverse_basis.to(spectrum.dtype), stride=self.hop
        )
        ones = torch.ones_like(spectrum[:1, :1])
        weight = functional.conv_transpose1d(
            ones, self.envelope.to(spectrum.dtype), stride=self.hop
        )
        half = self.n_fft // 2
        return (wave[:, :, half:-half] / weight[:, :, half:-half]).squeeze(1)
