"""The HiFT vocoder: mel to waveform by a harmonic source, upsampling and an inverse STFT.

With `look_ahead=None`, all convolutions are centered (v1, v2). Otherwise they are causal, except
the first one of a module, which sees its own frame and the `look_ahead` frames after it (v3).

B batch, F mel bands, T mel frames, S samples, H harmonics, C channels.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.arguments import Count
from cosyexp.models.hifigan.convolutions import convolution, downsampling, entrance, upsampling
from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import ConvolutionalSTFT
from cosyexp.registry import register

F0_REACH = 5  # frames on either side that the centered F0 predictor sees


class Snake(nn.Module):
    """Snake activation, x + sin^2(a x) / a with one `a` per channel (Ziyin et al. 2020, eq. 3).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x_BCS: Tensor) -> Tensor:
        """Applies the activation to every sample."""
        alpha = self.alpha.unsqueeze(1)
        return x_BCS + torch.sin(x_BCS * alpha).square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Residual block of dilated convolutions with Snake activations.

    The multi-receptive field fusion of HiFi-GAN averages several of these (Kong et al. 2020,
    "HiFi-GAN", section 2.2.1). Mirrors `ResBlock` of the original CosyVoice.

    Args:
        channels: C.
        kernel: Kernel size; must be odd.
        dilations: Dilation of each residual unit.
        causal: Whether the convolutions are causal.
    """

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
        """Applies the block to (B, C, S)."""
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2)  # noqa: B905
        for snake1, conv1, snake2, conv2 in layers:
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


@register("module")
class F0Predictor(nn.Module):
    """Predicts F0 from a mel spectrogram by five convolutions and a linear layer.

    Mirrors `ConvRNNF0Predictor` and `CausalConvRNNF0Predictor` of the original CosyVoice. Unlike
    there, the last layer is initialized to the scale of Hz, which small updates would take long to
    reach.

    Args:
        mel_bins: F.
        channels: Number of hidden channels.
        look_ahead: Frames of look-ahead of the first convolution, the others being causal; None if
            all are centered.
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
        """Returns F0 in Hz, (B, T).

        The last layer is in full precision even under autocast: at 200 Hz, bf16 has steps of 1 Hz.
        """
        hidden_BTC = self.condnet(mel_BFT).transpose(1, 2)
        # TorchScript does not support autocast. It skips this branch without compiling it, as long
        # as the two ifs stay nested.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if torch.is_autocast_enabled(mel_BFT.device.type):
                with torch.autocast(mel_BFT.device.type, enabled=False):
                    return self.classifier(hidden_BTC.float()).squeeze(2).abs()
        return self.classifier(hidden_BTC).squeeze(2).abs()


class Spoken(NamedTuple):
    """What a stream keeps of the frames before.

    Attributes:
        mel_BFT: The mel of the last frames that were returned, and of those that were not yet.
        source_B1S: The excitation of the former.
        f0_BT: F0 of all frames that were returned, in Hz.
    """

    mel_BFT: Tensor
    source_B1S: Tensor
    f0_BT: Tensor


@register("network")
class HiFTGenerator(nn.Module):
    """Generates waveforms from mel spectrograms (Li et al. 2023, "HiFTNet").

    Upsampling stages as in HiFi-GAN (Kong et al. 2020) predict a spectrum for an inverse STFT; each
    stage also reads the spectrum of a harmonic excitation. Mirrors `HiFTGenerator` and
    `CausalHiFTGenerator` of the original CosyVoice.

    Args:
        mel_bins: F.
        channels: Channels before the first stage; each stage halves them.
        rates: Upsampling rate of each stage. Their product times `n_hop` is the hop of the mel.
        kernels: Kernel size of the upsampling convolution of each stage.
        source: Generates the excitation.
        f0: Predicts F0.
        resblock_kernels: Kernel sizes of the parallel residual blocks in every stage; odd.
        source_kernels: Kernel size of the excitation's residual block in each stage; odd.
        dilations: Dilations of the parallel residual blocks: one list for all of them, or a list
            for each.
        source_dilations: The same for the residual blocks of the excitation; None for `dilations`.
        n_fft: FFT size of the STFT, in samples.
        n_hop: Samples per frame of the STFT.
        look_ahead: Frames of look-ahead of the first convolution, the others being causal; None if
            all are centered.
        leak: Slope of the leaky ReLUs.
        loudest: Amplitude at which the waveform is clipped.

    Raises:
        ValueError: `channels` cannot be halved once per stage, or a residual block has an even
            kernel size.
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
        look_ahead: Count | None = None,
        leak: float = 0.1,
        loudest: float = 0.99,
    ) -> None:
        super().__init__()
        if channels % 2 ** len(rates):
            raise ValueError(
                f"channels={channels} must be a multiple of {2 ** len(rates)}, "
                f"as each of the {len(rates)} stages in rates halves it"
            )
        if even := [kernel for kernel in (*resblock_kernels, *source_kernels) if kernel % 2 == 0]:
            raise ValueError(
                f"resblock_kernels and source_kernels must be odd, but one of them is {even[0]}"
            )
        causal = look_ahead is not None
        widths = [channels // 2 ** (i + 1) for i in range(len(rates))]
        # The spectrum of the excitation has the rate of the last stage; the earlier stages
        # downsample it to theirs.
        downs = list(accumulate([1, *list(rates)[:0:-1]], mul))[::-1]
        blocks = list(zip(resblock_kernels, for_each(resblock_kernels, dilations), strict=True))
        source_blocks = list(
            zip(
                widths,
                source_kernels,
                for_each(source_kernels, source_dilations or dilations),
                strict=True,
            )
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
        # Magnitudes are clipped at 100, and before the exponential, whose gradient would overflow.
        self.max_log_magnitude = math.log(1e2)
        # How many frames back and ahead of its own a sample depends on, apart from the phase.
        seen, samples = 6.0, 1  # by the first convolution; samples per frame
        for rate, kernel, (_, *source_block) in zip(rates, kernels, source_blocks, strict=True):
            samples *= rate
            seen += (kernel + max(map(seen_by, [*blocks, source_block]))) / samples
        seen += 2 / rates[0] + (6 + 2 * n_fft / n_hop) / samples  # excitation, end, STFTs
        self.reach = self.context = math.ceil(seen / 2) + 1 + F0_REACH
        if look_ahead is not None and f0.look_ahead is not None:
            # ahead: generator, F0 predictor, and one frame that the STFT windows reach into
            self.reach = math.ceil(seen) + 1 + 2 * F0_REACH
            self.context = look_ahead + f0.look_ahead + 1

    def forward(
        self, mel_BFT: Tensor, phase_BH: Tensor, noise_BHS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Generates waveforms.

        Args:
            mel_BFT: Log-mel spectrograms.
            phase_BH: Starting phases of the harmonics in radians, 0 for the fundamental.
            noise_BHS: Standard normal noise of the excitation.

        Returns:
            The waveforms (B, S) in [-1, 1], S = T * hop, and the predicted F0 (B, T) in Hz.
        """
        f0_BT = self.f0_predictor(mel_BFT)
        return self.decode(mel_BFT, self.m_source(f0_BT, phase_BH, noise_BHS)), f0_BT

    def speak(
        self,
        mel_BFT: Tensor,
        phase_BH: Tensor,
        noise_BHS: Tensor,
        *,
        past: Spoken | None = None,
        final: bool = True,
    ) -> tuple[Tensor, Spoken]:
        """Generates the next piece of a stream: the waveform is that of the whole mel.

        Args:
            mel_BFT: Log-mel spectrograms of the frames after those of earlier calls.
            phase_BH: Starting phases of the stream, see `forward`.
            noise_BHS: Standard normal noise, see `forward`, of all frames whose waveform was not
                returned yet.
            past: What the call before kept; None for the first piece.
            final: Whether the stream ends with this piece. Otherwise no waveform is returned for
                the last `context` frames, as the frames to come would change it.

        Returns:
            The waveforms of the next frames (B, S), and what the next call needs.
        """
        if past is None:
            past = Spoken(mel_BFT[:, :, :0], noise_BHS[:, :1, :0], mel_BFT[:, 0, :0])
        hop, done = self.m_source.hop, past.f0_BT.size(1)
        mel_BFT = torch.cat([past.mel_BFT, mel_BFT], dim=2)
        before = past.source_B1S.size(2) // hop  # frames that were returned, and serve as context
        end = mel_BFT.size(2) if final else max(before, mel_BFT.size(2) - self.context)
        f0_BT = torch.cat([past.f0_BT, self.f0_predictor(mel_BFT)[:, before:]], dim=1)
        new_B1S = self.m_source(f0_BT, phase_BH, noise_BHS, first=done)
        source_B1S = torch.cat([past.source_B1S, new_B1S], dim=2)
        kept = max(0, end - self.reach)
        wave_BS = self.decode(mel_BFT, source_B1S)[:, before * hop : end * hop]
        spoken = Spoken(
            mel_BFT[:, :, kept:],
            source_B1S[:, :, kept * hop : end * hop],
            f0_BT[:, : done + end - before],
        )
        return wave_BS, spoken

    def decode(self, mel_BFT: Tensor, source_B1S: Tensor) -> Tensor:
        """Generates waveforms from mel spectrograms and an excitation.

        Args:
            mel_BFT: Log-mel spectrograms.
            source_B1S: The excitation, see `HarmonicSource`.

        Returns:
            The waveforms, (B, S), clipped at `loudest`.
        """
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
        magnitude = torch.exp(x[:, :bins].clamp(max=self.max_log_magnitude))
        phase = torch.sin(x[:, bins:])
        real, imaginary = magnitude * torch.cos(phase), magnitude * torch.sin(phase)
        wave = self.stft.inverse(torch.cat([real, imaginary], dim=1))
        return wave.clamp(-self.loudest, self.loudest)


def seen_by(block: Sequence[Any]) -> int:
    """Returns how many samples around its own a residual block (kernel, dilations) sees."""
    kernel, dilations = block
    return sum((kernel - 1) * (dilation + 1) for dilation in dilations)


def for_each(
    kernels: Sequence[int], dilations: Sequence[int] | Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Returns a list of dilations for each kernel; a single list serves all kernels."""
    if isinstance(dilations[0], int):
        return [dilations for _ in kernels]  # type: ignore[misc]
    return list(dilations)  # type: ignore[arg-type]
