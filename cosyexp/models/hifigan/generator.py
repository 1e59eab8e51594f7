"""The HiFT vocoder: mel to waveform by a harmonic source, upsampling and an inverse STFT.

B batch, F mel bands, T mel frames, S samples, H harmonics, C channels.

A part with a `look_ahead` is causal: its first layer sees so many frames to the right and none to the left, the others the left alone.
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


class OneSided(nn.Conv1d):
    """A convolution with zeros `before` and `after`; each sample is taken `repeat` times first."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        *,
        before: int = 0,
        after: int = 0,
        stride: int = 1,
        dilation: int = 1,
        repeat: int = 1,
    ) -> None:
        super().__init__(ins, outs, kernel, stride, dilation=dilation)
        self.before, self.after, self.repeat = before, after, repeat

    def forward(self, x_BCS: Tensor) -> Tensor:
        x = x_BCS.repeat_interleave(self.repeat, dim=2) if self.repeat > 1 else x_BCS
        return self._conv_forward(
            functional.pad(x, (self.before, self.after)), self.weight, self.bias
        )


def convolution(ins: int, outs: int, kernel: int, *, causal: bool, dilation: int = 1) -> nn.Conv1d:
    """It keeps the length."""
    reach = dilation * (kernel - 1)
    if causal:
        return weight_norm(OneSided(ins, outs, kernel, before=reach, dilation=dilation))
    return weight_norm(nn.Conv1d(ins, outs, kernel, dilation=dilation, padding=reach // 2))


def entrance(ins: int, outs: int, kernel: int, look_ahead: int | None) -> nn.Conv1d:
    """The first layer; `kernel` is that of a centred one."""
    if look_ahead is None:
        return convolution(ins, outs, kernel, causal=False)
    return weight_norm(OneSided(ins, outs, look_ahead + 1, after=look_ahead))


def upsampling(ins: int, outs: int, kernel: int, rate: int, *, causal: bool) -> nn.Module:
    if causal:
        return weight_norm(OneSided(ins, outs, kernel, before=kernel - 1, repeat=rate))
    return weight_norm(nn.ConvTranspose1d(ins, outs, kernel, rate, padding=(kernel - rate) // 2))


def downsampling(ins: int, outs: int, rate: int, *, causal: bool) -> nn.Module:
    """From rate * n + 1 samples to n; if the rate is 1, it keeps the length."""
    if rate == 1:
        return nn.Conv1d(ins, outs, 1)
    if causal:
        return OneSided(ins, outs, 2 * rate, before=rate - 1, stride=rate)
    return nn.Conv1d(ins, outs, 2 * rate, rate, padding=rate // 2)


class ResBlock(nn.Module):
    """Dilated convolutions with residuals and snakes (Kong et al. 2020, "HiFi-GAN", section 2.2.1)."""

    def __init__(
        self, channels: int, kernel: int, dilations: Sequence[int], *, causal: bool = False
    ) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            convolution(channels, channels, kernel, causal=causal, dilation=step)
            for step in dilations
        )
        self.convs2 = nn.ModuleList(
            convolution(channels, channels, kernel, causal=causal) for _ in dilations
        )
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2)  # noqa: B905
        for snake1, conv1, snake2, conv2 in layers:
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class F0Predictor(nn.Module):
    """Five convolutions and a linear layer: F0 in Hz from a mel spectrogram.

    look_ahead: frames to the right that it sees, or None if centred.
    The last layer starts at the scale of Hz, which small steps would take long to reach.
    """

    def __init__(self, *, mel_bins: int, channels: int, look_ahead: int | None = None) -> None:
        super().__init__()
        self.look_ahead = look_ahead
        self.condnet = nn.Sequential(entrance(mel_bins, channels, 3, look_ahead), nn.ELU())
        for _ in range(4):
            self.condnet.append(convolution(channels, channels, 3, causal=look_ahead is not None))
            self.condnet.append(nn.ELU())
        self.classifier = nn.Linear(channels, 1)
        with torch.no_grad():
            self.classifier.weight.mul_(100.0)
            self.classifier.bias.fill_(100.0)

    def forward(self, mel_BFT: Tensor) -> Tensor:
        """F0 in full precision also under autocast: bf16 has steps of 1 Hz and more."""
        hidden_BTC = self.condnet(mel_BFT).transpose(1, 2)
        if not torch.jit.is_scripting():  # noqa: SIM102  (a script knows no autocast, and reads no further)
            if torch.is_autocast_enabled(mel_BFT.device.type):
                with torch.autocast(mel_BFT.device.type, enabled=False):
                    return self.classifier(hidden_BTC.float()).squeeze(2).abs()
        return self.classifier(hidden_BTC).squeeze(2).abs()


class HiFTGenerator(nn.Module):
    """Mel to waveform (Li et al. 2023, "HiFTNet"; the stages of "HiFi-GAN").

    channels: width before the first stage; each stage halves it.
    rates, kernels: of the upsampling convolutions. The hop of the mel is the product of the rates times that of the inverse STFT.
    resblock_kernels, source_kernels: of the residual blocks of every stage, and of the source's one in each stage.
    dilations, source_dilations: of these blocks; one list for all, or one for each kernel. The source's are the others' if None.
    look_ahead: frames to the right that it sees, or None if centred.
    leak: slope of the leaky ReLUs. loudest: the wave is clipped there.
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
        dilations: Sequence[int] | Sequence[Sequence[int]] = (1, 3, 5),
        source_dilations: Sequence[int] | Sequence[Sequence[int]] | None = None,
        n_fft: int = 16,
        n_hop: int = 4,
        look_ahead: int | None = None,
        leak: float = 0.1,
        loudest: float = 0.99,
    ) -> None:
        super().__init__()
        if channels % 2 ** len(rates):
            raise ValueError(
                f"channels={channels} cannot be halved {len(rates)} times, once for each of rates"
            )
        if even := [kernel for kernel in (*resblock_kernels, *source_kernels) if kernel % 2 == 0]:
            raise ValueError(
                f"a residual block with a kernel of {even[0]} has no middle: give odd numbers"
            )
        widths, causal = (
            [channels // 2 ** (i + 1) for i in range(len(rates))],
            look_ahead is not None,
        )
        # the source's spectrum has the rate of the last stage; each stage takes it down to its own
        downs = list(accumulate([1, *list(rates)[:0:-1]], mul))[::-1]
        blocks = list(zip(resblock_kernels, for_each(resblock_kernels, dilations), strict=True))
        source_blocks = zip(
            widths,
            source_kernels,
            for_each(source_kernels, source_dilations or dilations),
            strict=True,
        )
        self.m_source = source
        self.conv_pre = entrance(mel_bins, channels, 7, look_ahead)
        self.ups = nn.ModuleList(
            upsampling(2 * width, width, kernel, rate, causal=causal)
            for width, rate, kernel in zip(widths, rates, kernels, strict=True)
        )
        self.source_downs = nn.ModuleList(
            downsampling(n_fft + 2, width, down, causal=causal)
            for width, down in zip(widths, downs, strict=True)
        )
        self.source_resblocks = nn.ModuleList(
            ResBlock(width, kernel, steps, causal=causal) for width, kernel, steps in source_blocks
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width, kernel, steps, causal=causal)
            for width in widths
            for kernel, steps in blocks
        )
        self.conv_post = convolution(widths[-1], n_fft + 2, 7, causal=causal)
        self.f0_predictor = f0
        self.stft = ConvolutionalSTFT(n_fft, n_hop)
        self.branches, self.leak, self.loudest = len(blocks), leak, loudest
        self.loudest_bin = math.log(
            1e2
        )  # clipped before the exponential, whose gradient would overflow
        # the last frames of a mel, whose wave more mel would change: each part's look-ahead, and one that windows reach into
        self.context = (
            0 if look_ahead is None or f0.look_ahead is None else look_ahead + f0.look_ahead + 1
        )

    def forward(
        self, mel_BFT: Tensor, phase_BH: Tensor, noise_BHS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The wave (B, S) in [-1, 1], S = T * hop, and the predicted F0 (B, T) in Hz.

        phase, noise: the draws of the source, see `HarmonicSource`.
        """
        f0_BT = self.f0_predictor(mel_BFT)
        return self.decode(mel_BFT, self.m_source(f0_BT, phase_BH, noise_BHS)), f0_BT

    def speak(
        self,
        mel_BFT: Tensor,
        phase_BH: Tensor,
        noise_BHS: Tensor,
        *,
        heard_B1S: Tensor | None = None,
        final: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """A piece of a stream: the wave (B, S) and its excitation (B, 1, S).

        heard: the excitation of the piece before, which goes on at the start of this one. final: if not, the last `context` frames
        of the mel give no wave, as what follows would change it.
        """
        source_B1S = self.m_source(self.f0_predictor(mel_BFT), phase_BH, noise_BHS)
        if heard_B1S is not None:
            source_B1S = torch.cat([heard_B1S, source_B1S[:, :, heard_B1S.size(2) :]], dim=2)
        sure = source_B1S.size(2) - (
            0 if final else min(mel_BFT.size(2), self.context) * self.m_source.hop
        )
        return self.decode(mel_BFT, source_B1S)[:, :sure], source_B1S[:, :, :sure]

    def decode(self, mel_BFT: Tensor, source_B1S: Tensor) -> Tensor:
        """The wave (B, S) of a mel and an excitation (B, 1, S)."""
        spectrum = self.stft(source_B1S)
        x = self.conv_pre(mel_BFT)
        stages = zip(self.ups, self.source_downs, self.source_resblocks)  # noqa: B905
        for i, (up, down, block) in enumerate(stages):
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
        wave = self.stft.inverse(
            torch.cat([magnitude * torch.cos(phase), magnitude * torch.sin(phase)], dim=1)
        )
        return wave.clamp(-self.loudest, self.loudest)


def for_each(
    kernels: Sequence[int], dilations: Sequence[int] | Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """The dilations of the block of each kernel."""
    return [dilations for _ in kernels] if isinstance(dilations[0], int) else list(dilations)  # type: ignore[arg-type, misc]
