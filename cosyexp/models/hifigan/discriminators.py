"""The two families of discriminators that judge a wave: by its periods, and by its spectrograms.

B batch, S samples, P period. Every score and every feature map keeps the batch dimension first.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from cosyexp.models.layers.spectrogram import HALVES

LEAK = 0.1  # slope of the leaky ReLUs


class PeriodDiscriminator(nn.Module):
    """Two-dimensional convolutions over the wave folded at a period (Kong et al. 2020, section 2.3)."""

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
        """The feature maps; the last one, flattened, is the score."""
        missing = -wave_BS.size(1) % self.period
        x = functional.pad(wave_BS.unsqueeze(1), (0, missing), mode="reflect").unflatten(
            2, (-1, self.period)
        )
        maps = []
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), LEAK)
            maps.append(x)
        return [*maps, self.conv_post(x)]


class SpectralDiscriminator(nn.Module):
    """Convolutions over a magnitude spectrogram of one resolution (Jang et al. 2021, "UnivNet", section 2.3)."""

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
        """The feature maps; the last one, flattened, is the score."""
        with torch.autocast(wave_BS.device.type, enabled=False):
            wave = wave_BS.float() if wave_BS.dtype in HALVES else wave_BS
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
    """Discriminators of one kind."""

    def __init__(self, discriminators: Iterable[nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, wave_BS: Tensor) -> list[list[Tensor]]:
        return [discriminator(wave_BS) for discriminator in self.discriminators]


class Discriminators(nn.Module):
    """All of them, under the key names of the original: `mpd` by period, `mrd` by resolution.

    channels: of the period discriminators' convolutions. spectral_channels: of the others'.
    resolutions: (n_fft, hop, window) in samples.
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
        """For each discriminator its feature maps, the score map last."""
        return [*self.mpd(wave_BS), *self.mrd(wave_BS)]
