"""The HiFT vocoder: mel to waveform by a harmonic source, upsampling and an inverse STFT.

B batch, F mel bands, T mel frames, S samples, H harmonics, C channels.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import ConvolutionalSTFT


class Snake(nn.Module):
    """x + sin^2(a x) / a with one `a` per channel (Ziyin et al. 2020, eq. 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x_BCS: Tensor) -> Tensor:
        alpha = self.alpha.unsqueeze(1)
        return x_BCS + torch.sin(x_BCS * alpha).square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Dilated convolutions with residuals and snakes (Kong et al. 2020, "HiFi-GAN", section 2.2.1)."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2))

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for snake1, conv1, snake2, conv2 in zip(self.activations1, self.convs1, self.activations2, self.convs2):  # noqa: B905
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class F0Predictor(nn.Module):
    """Five convolutions and a linear layer: F0 in Hz from a mel spectrogram.

    The last layer starts at the scale of Hz, which small steps would take long to reach.
    """

    def __init__(self, *, mel_bins: int, channels: int) -> None:
        super().__init__()
        self.condnet = nn.Sequential()
        for i in range(5):
            self.condnet.append(weight_norm(nn.Conv1d(mel_bins if i == 0 else channels, channels, 3, padding=1)))
            self.condnet.append(nn.ELU())
        self.classifier = nn.Linear(channels, 1)
        with torch.no_grad():
            self.classifier.weight.mul_(100.0)
            self.classifier.bias.fill_(100.0)

    def forward(self, mel_BFT: Tensor) -> Tensor:
        return self.classifier(self.condnet(mel_BFT).transpose(1, 2)).squeeze(2).abs()


class HiFTGenerator(nn.Module):
    """Mel to waveform (Li et al. 2023, "HiFTNet"; the stages of "HiFi-GAN").

    channels: width before the first stage; each stage halves it.
    rates, kernels: of the transposed convolutions. The hop of the mel is their product times that of the inverse STFT.
    resblock_kernels, source_kernels: of the residual blocks of every stage, and of the source's one in each stage.
    dilations: of every residual block.
    source: makes the excitation. f0: predicts the fundamental.
    """

    def __init__(
        self,
        *,
        mel_bins: int,
        channels: int,
        rates: Sequence[int],
        kernels: Sequence[int],
        source: HarmonicSource,
        f0: F0Predictor,
        resblock_kernels: Sequence[int] = (3, 7, 11),
        source_kernels: Sequence[int] = (7, 11),
        dilations: Sequence[int] = (1, 3, 5),
        n_fft: int = 16,
        n_hop: int = 4,
    ) -> None:
        super().__init__()
        widths = [channels // 2 ** (i + 1) for i in range(len(rates))]
        # the source's spectrum has the rate of the last stage; each stage takes it down to its own
        downs = list(accumulate([1, *list(rates)[:0:-1]], mul))[::-1]
        self.m_source = source
        self.conv_pre = weight_norm(nn.Conv1d(mel_bins, channels, 7, padding=3))
        self.ups = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(2 * width, width, kernel, rate, padding=(kernel - rate) // 2))
            for width, rate, kernel in zip(widths, rates, kernels, strict=True)
        )
        self.source_downs = nn.ModuleList(
            nn.Conv1d(n_fft + 2, width, 1) if down == 1 else nn.Conv1d(n_fft + 2, width, 2 * down, down, padding=down // 2)
            for width, down in zip(widths, downs, strict=True)
        )
        self.source_resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations) for width, kernel in zip(widths, source_kernels, strict=True)
        )
        self.resblocks = nn.ModuleList(ResBlock(width, kernel, dilations) for width in widths for kernel in resblock_kernels)
        self.conv_post = weight_norm(nn.Conv1d(widths[-1], n_fft + 2, 7, padding=3))
        self.f0_predictor = f0
        self.stft = ConvolutionalSTFT(n_fft, n_hop)
        self.branches = len(resblock_kernels)
        self.leak = 0.1  # slope of the leaky ReLUs
        self.loudest = 0.99  # the wave is clipped here
        self.loudest_bin = math.log(1e2)  # clipped before the exponential, whose gradient would overflow

    def forward(self, mel_BFT: Tensor, phase_BH: Tensor, noise_BHS: Tensor) -> tuple[Tensor, Tensor]:
        """The wave (B, S) in [-1, 1], S = T * hop, and the predicted F0 (B, T) in Hz.

        phase, noise: the draws of the source, see `HarmonicSource`.
        """
        f0_BT = self.f0_predictor(mel_BFT)
        return self.decode(mel_BFT, self.m_source(f0_BT, phase_BH, noise_BHS)), f0_BT

    def decode(self, mel_BFT: Tensor, source_B1S: Tensor) -> Tensor:
        """The wave (B, S) of a mel and an excitation (B, 1, S)."""
        spectrum = self.stft(source_B1S)
        x = self.conv_pre(mel_BFT)
        for i, (up, down, block) in enumerate(zip(self.ups, self.source_downs, self.source_resblocks)):  # noqa: B905
            x = up(functional.leaky_relu(x, self.leak))
            if i == len(self.ups) - 1:
                x = functional.pad(x, (1, 0), mode="reflect")
            x = x + block(down(spectrum))
            total = torch.zeros_like(x)
            for j, resblock in enumerate(self.resblocks):
                if j // self.branches == i:
                    total = total + resblock(x)
            x = total / self.branches
        x = self.conv_post(functional.leaky_relu(x))
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            x = x.float()
        bins = self.stft.bins
        magnitude = torch.exp(x[:, :bins].clamp(max=self.loudest_bin))
        phase = torch.sin(x[:, bins:])
        wave = self.stft.inverse(torch.cat([magnitude * torch.cos(phase), magnitude * torch.sin(phase)], dim=1))
        return wave.clamp(-self.loudest, self.loudest)
