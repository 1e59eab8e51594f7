"""Discriminators of the vocoder: multi-period and multi-resolution.

B batch, S samples. Feature maps have the batch dimension first.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from cosyexp.models.layers.spectrogram import HALF_DTYPES
from cosyexp.registry import register

LEAK = 0.1  # slope of the leaky ReLUs


class PeriodDiscriminator(nn.Module):
    """Discriminates waveforms folded at a period (Kong et al. 2020, "HiFi-GAN", section 2.3).

    Mirrors `DiscriminatorP` of HiFi-GAN, which the original CosyVoice uses.

    Args:
        period: The period in samples.
        channels: Output channels of each convolution.
    """

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        widths = [1, *channels]
        last = len(channels) - 1
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3 if i < last else 1, 1), padding=(2, 0)))
            for i, (a, b) in enumerate(zip(widths, channels, strict=False))
        )
        self.conv_post = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, padding=(1, 0)))

    def forward(self, wave_BS: Tensor) -> list[Tensor]:
        """Returns the feature maps; the last one is the score map."""
        missing = -wave_BS.size(1) % self.period
        padded = functional.pad(wave_BS.unsqueeze(1), (0, missing), mode="reflect")
        x = padded.unflatten(2, (-1, self.period))
        maps = []
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), LEAK)
            maps.append(x)
        return [*maps, self.conv_post(x)]


class SpectralDiscriminator(nn.Module):
    """Discriminates magnitude spectrograms (Jang et al. 2021, "UnivNet", section 2.3).

    Mirrors `SpecDiscriminator` of the original CosyVoice.

    Args:
        n_fft: FFT size in samples.
        hop: Samples per frame.
        win: Window length in samples.
        channels: Channels of the convolutions.
    """

    window: Tensor

    def __init__(self, n_fft: int, hop: int, win: int, channels: int) -> None:
        super().__init__()
        self.n_fft, self.hop, self.win = n_fft, hop, win
        self.register_buffer("window", torch.hann_window(win), persistent=False)
        self.discriminators = nn.ModuleList(
            weight_norm(nn.Conv2d(a, channels, (3, width), (1, stride), padding=(1, width // 2)))
            for a, width, stride in [(1, 9, 1), *[(channels, 9, 2)] * 3, (channels, 3, 1)]
        )
        self.out = weight_norm(nn.Conv2d(channels, 1, 3, 1, 1))

    def forward(self, wave_BS: Tensor) -> list[Tensor]:
        """Returns the feature maps; the last one is the score map."""
        with torch.autocast(wave_BS.device.type, enabled=False):
            wave = wave_BS.float() if wave_BS.dtype in HALF_DTYPES else wave_BS
            spectrum = torch.stft(
                wave, self.n_fft, self.hop, self.win, self.window, return_complex=True
            )
            x = spectrum.abs().transpose(1, 2).unsqueeze(1)
        maps = []
        for conv in self.discriminators:
            x = functional.leaky_relu(conv(x), LEAK)
            maps.append(x)
        return [*maps, self.out(x)]


class Bank(nn.Module):
    """A list of discriminators, with the parameter names of the original.

    Mirrors `MultiPeriodDiscriminator` of HiFi-GAN (Kong et al. 2020) and
    `MultiResSpecDiscriminator` of the original CosyVoice.

    Args:
        discriminators: The discriminators.
    """

    def __init__(self, discriminators: Iterable[nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, wave_BS: Tensor) -> list[list[Tensor]]:
        """Returns the feature maps of each discriminator, the score map last."""
        return [discriminator(wave_BS) for discriminator in self.discriminators]


@register("network")
class Discriminators(nn.Module):
    """All discriminators of the vocoder, as `MultipleDiscriminator` of the original CosyVoice.

    The multi-period discriminator is that of HiFi-GAN (Kong et al. 2020), the multi-resolution one
    follows UnivNet (Jang et al. 2021).

    Args:
        periods: One period discriminator for each of these periods, in samples.
        channels: Output channels of each convolution of the period discriminators.
        resolutions: One spectral discriminator for each (n_fft, hop, win), in samples.
        spectral_channels: Channels of the spectral discriminators.
    """

    def __init__(
        self,
        *,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        channels: Sequence[int] = (32, 128, 512, 1024, 1024),
        resolutions: Sequence[Sequence[int]] = (
            (1024, 120, 600),
            (2048, 240, 1200),
            (512, 50, 240),
        ),
        spectral_channels: int = 32,
    ) -> None:
        super().__init__()
        self.mpd = Bank(PeriodDiscriminator(period, channels) for period in periods)
        self.mrd = Bank(
            SpectralDiscriminator(n_fft, hop, win, spectral_channels)
            for n_fft, hop, win in resolutions
        )

    def forward(self, wave_BS: Tensor) -> list[list[Tensor]]:
        """Returns the feature maps of each discriminator, the score map last."""
        return [*self.mpd(wave_BS), *self.mrd(wave_BS)]
