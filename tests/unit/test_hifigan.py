"""Spectrograms, the harmonic source, and the vocoder with its discriminators."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.data.collators.hifigan import VocoderBatch, VocoderCollator
from cosyexp.data.draws import Draws
from cosyexp.errors import UserError
from cosyexp.exporting.components import fold_parametrizations
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.verify import TOLERANCE, compare, eager
from cosyexp.models.hifigan.discriminators import Discriminators, PeriodDiscriminator
from cosyexp.models.hifigan.generator import F0Predictor, HiFTGenerator, ResBlock, Snake
from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import (
    ConvolutionalSTFT,
    MelSpectrogram,
    mel_filters,
    slaney_mel,
)
from cosyexp.registry import build

RATE, HOP, BINS, HARMONICS = 16000, 256, 20, 5
FAMILIES = ("demo", "cosyvoice", "cosyvoice2", "cosyvoice3")
TINY = [
    *(
        "network.channels=16",
        "network.f0.channels=8",
        "network.resblock_kernels=[3]",
        "network.dilations=[1]",
    ),
    *("objective.discriminator.channels=[2,4]", "objective.discriminator.spectral_channels=2"),
    "objective.discriminator.resolutions=[[256,64,256],[128,32,100]]",
]


def config(family: str, *words: str) -> TrainConfig:
    """Returns the config of `cosyexp.train` for a tiny vocoder of a family."""
    return compose_train(
        [f"family={family}", "model=hifigan", "data=prepared", "data.dir=unused", *TINY, *words]
    )


def network(family: str) -> Any:
    """Returns a tiny vocoder of a family."""
    torch.manual_seed(0)
    return build(config(family).network, "network")


# spectrograms


@pytest.mark.parametrize(("n_fft", "hop"), [(16, 4), (32, 8), (32, 16), (64, 16)])
def test_the_convolutional_stft_is_torch_s(n_fft, hop):
    wave, ours, window = (
        torch.randn(3, 512),
        ConvolutionalSTFT(n_fft, hop),
        torch.hann_window(n_fft),
    )
    found = ours(wave.unsqueeze(1))
    wanted = torch.stft(
        wave, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    assert_close(found, torch.cat([wanted.real, wanted.imag], dim=1), rtol=0, atol=1e-5)
    assert_close(
        ours.inverse(found),
        torch.istft(wanted, n_fft, hop, window=window, center=True),
        rtol=0,
        atol=1e-5,
    )
    assert_close(ours.inverse(found), wave, rtol=0, atol=1e-5)


def test_the_inverse_stft_of_any_spectrum_is_torch_s():
    ours, parts = ConvolutionalSTFT(16, 4), torch.randn(2, 2, 9, 30)
    parts[:, 1, [0, -1]] = 0  # no real signal has an imaginary part there
    wanted = torch.istft(
        torch.complex(parts[:, 0], parts[:, 1]), 16, 4, window=torch.hann_window(16), center=True
    )
    assert_close(ours.inverse(parts.flatten(1, 2)), wanted, rtol=0, atol=1e-5)


def mel(fmax: float = 8000.0) -> MelSpectrogram:
    """Returns a spectrogram of 80 bands."""
    return MelSpectrogram(
        sample_rate=RATE, n_fft=1024, hop=HOP, win=1024, bins=80, fmin=0.0, fmax=fmax
    )


@pytest.mark.parametrize("samples", [2048, 2304, 10000, 16001])
def test_a_mel_has_a_frame_a_hop(samples):
    assert mel()(torch.randn(2, samples)).shape == (2, 80, samples // HOP)


def test_silence_is_the_floor():
    found = mel()(torch.zeros(1, 4096))
    assert_close(found, torch.full_like(found, math.log(1e-5)))


@pytest.mark.parametrize("frequency", [220.0, 440.0, 1000.0, 3000.0, 7000.0])
def test_a_sine_lies_in_its_band(frequency):
    wave = 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(RATE) / RATE)
    energy = mel()(wave[None])[0, :, 10:-10].exp().mean(1)
    edges = torch.linspace(0, float(slaney_mel(torch.tensor(8000.0))), 82)
    centre = float(slaney_mel(torch.tensor(frequency)))
    band = int(energy.argmax())
    assert edges[band] < centre < edges[band + 2]
    far = (edges[1:-1] - centre).abs() > 4 * (edges[1] - edges[0])
    assert energy[far].max() < 0.01 * energy.max()


def test_a_wave_twice_as_loud_is_higher_by_log_2():
    wave = torch.randn(1, 8192) * 0.1
    assert_close(
        mel()(2 * wave) - mel()(wave), torch.full((1, 80, 32), math.log(2)), rtol=0, atol=1e-3
    )


def test_mel_filters_are_triangles_of_equal_area():
    filters = mel_filters(RATE, 4096, 40, 0, 8000).double()
    assert_close(
        filters.sum(1) * RATE / 4096, torch.ones(40, dtype=torch.float64), rtol=0.05, atol=0
    )
    peaks = filters.argmax(1)
    assert (filters >= 0).all() and (peaks[1:] > peaks[:-1]).all()
    for row, peak in zip(filters, peaks.tolist(), strict=True):
        assert (row[: peak + 1].diff() >= 0).all() and (row[peak:].diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mel_is_in_full_precision_also_under_autocast(dtype):
    wave = (torch.randn(1, 4096) * 0.1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = mel()(wave)
    assert found.dtype == torch.float32 and torch.equal(found, mel()(wave.float()))


# the source


def source(harmonics: int = HARMONICS) -> HarmonicSource:
    """Returns a source with random weights."""
    torch.manual_seed(0)
    return HarmonicSource(sample_rate=RATE, hop=HOP, harmonics=harmonics)


def sines(f0: Sequence[float], phase: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """Returns the sines of one row, (H, S)."""
    f0_1T = torch.as_tensor(f0, dtype=torch.float32)[None]
    phase = torch.zeros(1, HARMONICS) if phase is None else phase
    noise = torch.zeros(1, HARMONICS, f0_1T.size(1) * HOP) if noise is None else noise
    return source().sines(f0_1T, phase, noise)[0]


@pytest.mark.parametrize("f0", [62.5, 110.0, 187.5, 430.0])
def test_a_constant_f0_gives_its_harmonics(f0):
    found = sines([f0] * 125)
    assert found.shape == (HARMONICS, 2 * RATE)
    for harmonic, wave in enumerate(found, start=1):
        spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave))).abs()
        assert abs(float(spectrum.argmax()) / 2 - harmonic * f0) <= 0.5  # bins of 0.5 Hz
        assert float(wave.abs().max()) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("glide", "rate", "hop"),
    [("running", 22050, 256), ("linear", 24000, 480), ("nearest", 24000, 480)],
)
def test_phases_are_right_after_half_a_minute(glide, rate, hop):
    """Against sums over samples in double precision, in which phases are never reduced."""
    draw = np.random.default_rng(0)
    frames = 30 * rate // hop
    f0 = draw.uniform(80, 400, frames).astype(np.float32)
    start = draw.uniform(-math.pi, math.pi, (HARMONICS, 1)).astype(np.float32)
    if glide == "running":
        turns = np.cumsum(np.repeat(f0.astype(np.float64) / rate, hop))
    else:
        by_frame, middles = (
            np.cumsum(f0.astype(np.float64) / rate * hop),
            np.arange(frames) * hop + (hop - 1) / 2,
        )
        turns = (
            np.interp(np.arange(frames * hop), middles, by_frame)
            if glide == "linear"
            else np.repeat(by_frame, hop)
        )
    wanted = 0.1 * np.sin(
        2 * math.pi * np.arange(1, HARMONICS + 1)[:, None] * turns + start * (glide == "running")
    )
    net, noise = (
        HarmonicSource(sample_rate=rate, hop=hop, harmonics=HARMONICS, glide=glide),
        torch.zeros(1, HARMONICS, frames * hop),
    )
    found = net.sines(torch.from_numpy(f0)[None], torch.from_numpy(start.T), noise)[0]
    assert np.abs(found.numpy() - wanted).max() < 1e-5


def test_a_source_knows_its_glides():
    with pytest.raises(ValueError, match="glide=sliding must be one of running, linear, nearest"):
        HarmonicSource(sample_rate=RATE, hop=HOP, glide="sliding")


def test_unvoiced_frames_are_noise_alone_and_voiced_ones_have_little():
    noise = torch.randn(1, HARMONICS, 4 * HOP)
    found, quiet = sines([0.0, 200.0, 5.0, 200.0], noise=noise), sines([0.0, 200.0, 5.0, 200.0])
    for frame, (voiced, spread) in enumerate(
        [(False, 0.1 / 3), (True, 0.003), (False, 0.1 / 3), (True, 0.003)]
    ):
        part = slice(frame * HOP, (frame + 1) * HOP)
        assert_close(found[:, part] - quiet[:, part], spread * noise[0, :, part], rtol=0, atol=1e-6)
        assert quiet[:, part].any() == voiced


def test_the_source_merges_its_harmonics():
    net, noise = source(), torch.zeros(1, HARMONICS, 2 * HOP)
    found = net(torch.full((1, 2), 200.0), torch.zeros(1, HARMONICS), noise)
    mixed = (
        torch.einsum("h,hs->s", net.l_linear.weight[0], sines([200.0, 200.0])) + net.l_linear.bias
    )
    assert_close(found[0, 0], torch.tanh(mixed))


# the networks


def generator(
    n_fft: int = 16,
    n_hop: int = 4,
    rates: Sequence[int] = (8, 8),
    kernels: Sequence[int] = (16, 16),
) -> HiFTGenerator:
    """Returns a small generator in double precision."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"source": source(), "f0": F0Predictor(mel_bins=BINS, channels=8)}
    net = HiFTGenerator(
        mel_bins=BINS,
        channels=16,
        rates=rates,
        kernels=kernels,
        resblock_kernels=[3, 5],
        source_kernels=[7, 11],
        dilations=[1, 3],
        n_fft=n_fft,
        n_hop=n_hop,
        **parts,
    )
    return net.double().eval()


def draws(rows: int = 3, frames: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random inputs of a generator: mel, phase and noise."""
    draw = torch.Generator().manual_seed(0)
    mel = torch.randn(rows, BINS, frames, generator=draw, dtype=torch.float64) * 2 - 5
    phase = (torch.rand(rows, HARMONICS, generator=draw, dtype=torch.float64) * 2 - 1) * math.pi
    return (
        mel,
        phase,
        torch.randn(rows, HARMONICS, frames * HOP, generator=draw, dtype=torch.float64),
    )


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize(
    "sizes", [{}, {"n_fft": 32, "n_hop": 8, "rates": (8, 4), "kernels": (16, 8)}]
)
@torch.no_grad()
def test_a_wave_has_a_hop_a_frame_and_is_never_too_loud(frames, sizes):
    mel, phase, noise = draws(2, frames)
    wave, f0 = generator(**sizes)(20 * mel, phase, noise)
    assert wave.shape == (2, frames * HOP) and f0.shape == (2, frames)
    assert wave.abs().max() <= 0.99 and (f0 >= 0).all() and wave.isfinite().all()


def test_f0_learns_from_its_own_loss_alone():
    net: Any = generator()
    wave, f0 = net(*draws())
    wave.square().sum().backward()
    assert all(parameter.grad is None for parameter in net.f0_predictor.parameters())
    assert net.m_source.l_linear.weight.grad.any()
    f0.sum().backward()
    assert all(parameter.grad.any() for parameter in net.f0_predictor.parameters())


def test_snake_has_its_formula():
    snake, x = Snake(2), torch.randn(1, 2, 9)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.5, 3.0]))
    a = snake.alpha[:, None]
    assert_close(snake(x), x + torch.sin(a * x) ** 2 / a)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("channels=17", "channels=17 must be a multiple"),
        ("resblock_kernels=[4]", "one of them is 4"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(word, reason):
    with pytest.raises(UserError, match=f"HiFTGenerator cannot be built .*{reason}"):
        build(config("demo", f"network.{word}").network, "network")


def test_a_residual_block_keeps_the_length():
    x = torch.randn(1, 4, 13)
    assert ResBlock(4, 7, [1, 3, 5])(x).shape == x.shape


# discriminators


def discriminators() -> Discriminators:
    """Returns small discriminators."""
    torch.manual_seed(0)
    return Discriminators(
        periods=[2, 3],
        channels=[2, 4],
        resolutions=[[256, 64, 256], [128, 32, 100]],
        spectral_channels=2,
    )


@torch.no_grad()
def test_discriminators_treat_every_row_by_itself():
    net, waves = discriminators().double(), torch.randn(3, 1999, dtype=torch.float64)
    together = net(waves)
    assert len(together) == 4 and all(x.size(0) == 3 for maps in together for x in maps)
    for row in range(3):
        for ours, theirs in zip(net(waves[row : row + 1]), together, strict=True):
            for alone, rows in zip(ours, theirs, strict=True):
                assert_close(alone[0], rows[row], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_period_discriminator_sees_each_phase_by_itself():
    net = PeriodDiscriminator(3, [2, 4])
    wave = torch.randn(1, 300)
    other = wave.clone()
    other[:, 1::3] += 1
    for before, after in zip(net(wave), net(other), strict=True):
        changed = (before != after).flatten(0, 2).any(0)
        assert changed.tolist() == [False, True, False]


@torch.no_grad()
def test_spectra_are_in_full_precision_under_autocast():
    net, wave = discriminators(), torch.randn(1, 2000)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(wave)
    for ours, theirs in zip(found, net(wave), strict=True):
        assert (
            functional.cosine_similarity(ours[-1].float().flatten(), theirs[-1].flatten(), dim=0)
            > 0.99
        )


# the families


def batch_of(family: str, rows: int = 3, frames: int = 8) -> VocoderBatch:
    """Returns random segments in double precision."""
    spec, draw = config(family).family.mel, torch.Generator().manual_seed(0)
    harmonics, samples = 9, frames * spec.hop
    scale = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    return VocoderBatch(
        utts=tuple(str(row) for row in range(rows)),
        wave_BS=torch.randn(rows, samples, generator=draw).double() * 0.1 * scale,
        mel_BFT=torch.randn(rows, spec.bins, frames, generator=draw).double() * scale[..., None]
        - 5,
        f0_BT=100 + 100 * torch.rand(rows, frames, generator=draw).double(),
        phase_BH=(torch.rand(rows, harmonics, generator=draw).double() * 2 - 1) * math.pi,
        noise_BHS=torch.randn(rows, harmonics, samples, generator=draw).double(),
    )


def row_of(batch: VocoderBatch, row: int) -> VocoderBatch:
    """Returns a batch of one row."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: value[row : row + 1]
            for name, value in values.items()
            if isinstance(value, Tensor)
        },
        utts=("0",),
    )


def inputs_of(batch: VocoderBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the inputs of a generator."""
    return batch.mel_BFT, batch.phase_BH, batch.noise_BHS


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(family):
    net, batch = network(family).double(), batch_of(family)
    waves, f0 = net(*inputs_of(batch))
    for row in range(3):
        wave, own = net(*inputs_of(row_of(batch, row)))
        assert_close(wave[0], waves[row], rtol=0, atol=1e-9)
        assert_close(own[0], f0[row], rtol=0, atol=1e-9)


def losses_and_gradients(
    objective: Any, batch: VocoderBatch
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Returns the loss terms, and the gradients of all weights, of mel and of wave."""
    for tensor in (batch.mel_BFT, batch.wave_BS):
        tensor.grad = None
    terms, gradients = [], []
    for (name, trainable), loss in zip(
        objective.trainables.items(), objective.losses(batch), strict=True
    ):
        trainable.module.zero_grad()
        loss.scaled({"segments": 1}).backward()
        terms += [loss[term].sum.detach() for term in loss]
        gradients += [weight.grad.clone() for weight in trainable.module.parameters()]
        if name == "generator":
            assert batch.mel_BFT.grad is not None
            assert batch.mel_BFT.grad.any()
    return terms, gradients, [batch.mel_BFT.grad, batch.wave_BS.grad]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_a_batch_are_those_of_its_rows(family):
    objective = build(config(family).objective, "objective")(network(family).double())
    objective.discriminator.module.double(), objective.mel.double()
    batch = batch_of(family)
    rows = [row_of(batch, row) for row in range(3)]
    for part in (batch, *rows):
        part.mel_BFT.requires_grad_(), part.wave_BS.requires_grad_()
    found, alone = (
        losses_and_gradients(objective, batch),
        [losses_and_gradients(objective, row) for row in rows],
    )
    for kind in (0, 1):
        for together, *parts in zip(found[kind], *(own[kind] for own in alone), strict=True):
            assert_close(together, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-9)
    for together, *parts in zip(found[2], *(own[2] for own in alone), strict=True):
        assert_close(together, torch.cat(parts), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_stream_is_the_waveform_of_the_whole_mel(family):
    net = network(family).double()
    frames = 3 * (net.reach + net.context)
    mel, phase, noise = inputs_of(batch_of(family, frames=frames))
    hop, whole = net.m_source.hop, net(mel, phase, noise)[0]
    for sizes in ([frames], [5, net.context, 0, net.reach + net.context, 1]):
        past, waves, heard, done = None, [], 0, 0
        for size in [*sizes, frames - sum(sizes)]:
            heard += size
            wave, past = net.speak(
                mel[:, :, heard - size : heard],
                phase,
                noise[:, :, done * hop : heard * hop],
                past=past,
                final=heard == frames,
            )
            waves.append(wave)
            done += wave.size(1) // hop
            assert heard == frames or done == max(0, heard - net.context)
            assert (
                past.mel_BFT.size(2) <= net.reach + net.context
            )  # a chunk costs the same anywhere
        assert_close(torch.cat(waves, dim=1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "segment"), zip(FAMILIES, (8192, 24576, 24480, 24960), strict=True)
)
def test_segments_of(family, segment):
    settings = config(family)
    collator = build(settings.model.collator, "collator")
    assert collator.frames * settings.family.mel.hop == segment
    assert collator.frames <= settings.data.max_frames


def test_a_row_whose_mel_is_longer_than_its_wave_is_filled_up():
    """A mel that is aligned to speech tokens is longer."""
    settings = config("cosyvoice3")
    collator = build({**settings.model.collator, "segment": 6 * 480}, "collator")
    assert isinstance(collator, VocoderCollator)
    row: dict[str, np.ndarray] = {
        "wave": np.ones((1, 1500), np.int16),
        "mel": np.zeros((80, 4), np.float32),
        "f0": np.ones((1, 3), np.float32),
    }
    batch = collator.collate(["a"], [row], Draws(0, 0))
    assert batch.wave_BS.shape == (1, 2880) and batch.wave_BS.count_nonzero() == 1500
    assert batch.mel_BFT.shape == (1, 80, 6) and batch.f0_BT.tolist() == [[1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("form", [Onnx(), Jit()], ids=["onnx", "jit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocoder_of_a_family_is_exported(tmp_path, family, form):
    net = network(family)
    fold_parametrizations(net)
    node = config(family).components["hift"]
    component = build(node, "component", net.eval().requires_grad_(False)).eval()
    form.write(component, tmp_path / "hift")
    exported = form.load(tmp_path / "hift")
    assert compare(component, exported)["largest_error"]["wave"] < TOLERANCE
    for size in (1, 2, 1500):  # the last one: half a minute
        inputs = component.example(size, torch.Generator().manual_seed(size))
        assert_close(exported(*inputs), eager(component, *inputs), rtol=0, atol=TOLERANCE)


# types


def test_synthesis_changes_no_type():
    net, mel, draws = (
        generator().float(),
        torch.randn(1, BINS, 6),
        (torch.zeros(1, HARMONICS), torch.zeros(1, HARMONICS, 6 * HOP)),
    )
    wave, past = net.speak(mel, *draws)
    assert {x.dtype for x in (wave, *past)} == {torch.float32}
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32}
    net(mel, *draws)[0].sum().backward()


def test_f0_is_in_full_precision_under_autocast():
    predictor, mel = F0Predictor(mel_bins=BINS, channels=8), torch.randn(1, BINS, 50)
    with torch.autocast("cpu", torch.bfloat16):
        found = predictor(mel)
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).any()
