"""Spectrograms, the harmonic source, and the vocoder with its discriminators."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from cosyexp.models.hifigan.discriminators import Discriminators, PeriodDiscriminator
from cosyexp.models.hifigan.generator import F0Predictor, HiFTGenerator, ResBlock, Snake
from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import ConvolutionalSTFT, MelSpectrogram, mel_filters, slaney_mel

RATE, HOP, BINS, HARMONICS = 16000, 256, 20, 5

# spectrograms


@pytest.mark.parametrize(("n_fft", "hop"), [(16, 4), (32, 8), (32, 16), (64, 16)])
def test_the_convolutional_stft_is_torch_s(n_fft, hop):
    wave, ours, window = torch.randn(3, 512), ConvolutionalSTFT(n_fft, hop), torch.hann_window(n_fft)
    found = ours(wave.unsqueeze(1))
    wanted = torch.stft(wave, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True)
    assert_close(found, torch.cat([wanted.real, wanted.imag], dim=1), rtol=0, atol=1e-5)
    assert_close(ours.inverse(found), torch.istft(wanted, n_fft, hop, window=window, center=True), rtol=0, atol=1e-5)
    assert_close(ours.inverse(found), wave, rtol=0, atol=1e-5)


def test_the_inverse_stft_of_any_spectrum_is_torch_s():
    ours, parts = ConvolutionalSTFT(16, 4), torch.randn(2, 2, 9, 30)
    parts[:, 1, [0, -1]] = 0  # no real signal has an imaginary part there
    wanted = torch.istft(torch.complex(parts[:, 0], parts[:, 1]), 16, 4, window=torch.hann_window(16), center=True)
    assert_close(ours.inverse(parts.flatten(1, 2)), wanted, rtol=0, atol=1e-5)


def mel(fmax=8000.0):
    return MelSpectrogram(sample_rate=RATE, n_fft=1024, hop=HOP, win=1024, bins=80, fmin=0.0, fmax=fmax)


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
    assert_close(mel()(2 * wave) - mel()(wave), torch.full((1, 80, 32), math.log(2)), rtol=0, atol=1e-3)


def test_mel_filters_are_triangles_of_equal_area():
    filters = mel_filters(RATE, 4096, 40, 0, 8000).double()
    assert_close(filters.sum(1) * RATE / 4096, torch.ones(40, dtype=torch.float64), rtol=0.05, atol=0)
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


def source(harmonics=HARMONICS):
    torch.manual_seed(0)
    return HarmonicSource(sample_rate=RATE, hop=HOP, harmonics=harmonics)


def sines(f0, phase=None, noise=None):
    """Of one row, (H, S)."""
    f0 = torch.as_tensor(f0, dtype=torch.float32)[None]
    phase = torch.zeros(1, HARMONICS) if phase is None else phase
    noise = torch.zeros(1, HARMONICS, f0.size(1) * HOP) if noise is None else noise
    return source().sines(f0, phase, noise)[0]


@pytest.mark.parametrize("f0", [62.5, 110.0, 187.5, 430.0])
def test_a_constant_f0_gives_its_harmonics(f0):
    found = sines([f0] * 125)
    assert found.shape == (HARMONICS, 2 * RATE)
    for harmonic, wave in enumerate(found, start=1):
        spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave))).abs()
        assert abs(float(spectrum.argmax()) / 2 - harmonic * f0) <= 0.5  # bins of 0.5 Hz
        assert float(wave.abs().max()) == pytest.approx(0.1, rel=0.01)


def test_phases_run_on_when_f0_jumps():
    draw = np.random.default_rng(0)
    f0 = draw.uniform(80, 400, 300).astype(np.float32)
    phase = torch.tensor(draw.uniform(-math.pi, math.pi, (1, HARMONICS)), dtype=torch.float32)
    turns = np.cumsum(np.repeat(f0.astype(np.float64), HOP) / RATE)
    wanted = 0.1 * np.sin(2 * math.pi * np.arange(1, HARMONICS + 1)[:, None] * turns + phase.numpy().T)
    assert np.abs(sines(f0, phase).numpy() - wanted).max() < 1e-3


def test_unvoiced_frames_are_noise_alone_and_voiced_ones_have_little():
    noise = torch.randn(1, HARMONICS, 4 * HOP)
    found, quiet = sines([0.0, 200.0, 5.0, 200.0], noise=noise), sines([0.0, 200.0, 5.0, 200.0])
    for frame, (voiced, spread) in enumerate([(False, 0.1 / 3), (True, 0.003), (False, 0.1 / 3), (True, 0.003)]):
        part = slice(frame * HOP, (frame + 1) * HOP)
        assert_close(found[:, part] - quiet[:, part], spread * noise[0, :, part], rtol=0, atol=1e-6)
        assert quiet[:, part].any() == voiced


def test_the_source_merges_its_harmonics():
    net, noise = source(), torch.zeros(1, HARMONICS, 2 * HOP)
    found = net(torch.full((1, 2), 200.0), torch.zeros(1, HARMONICS), noise)
    mixed = torch.einsum("h,hs->s", net.l_linear.weight[0], sines([200.0, 200.0])) + net.l_linear.bias
    assert_close(found[0, 0], torch.tanh(mixed))


# the networks


def generator(n_fft=16, n_hop=4, rates=(8, 8), kernels=(16, 16)):
    torch.manual_seed(0)
    parts = {"source": source(), "f0": F0Predictor(mel_bins=BINS, channels=8)}
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


def draws(rows=3, frames=6):
    draw = torch.Generator().manual_seed(0)
    mel = torch.randn(rows, BINS, frames, generator=draw, dtype=torch.float64) * 2 - 5
    phase = (torch.rand(rows, HARMONICS, generator=draw, dtype=torch.float64) * 2 - 1) * math.pi
    return mel, phase, torch.randn(rows, HARMONICS, frames * HOP, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize("sizes", [{}, {"n_fft": 32, "n_hop": 8, "rates": (8, 4), "kernels": (16, 8)}])
@torch.no_grad()
def test_a_wave_has_a_hop_a_frame_and_is_never_too_loud(frames, sizes):
    mel, phase, noise = draws(2, frames)
    wave, f0 = generator(**sizes)(20 * mel, phase, noise)
    assert wave.shape == (2, frames * HOP) and f0.shape == (2, frames)
    assert wave.abs().max() <= 0.99 and (f0 >= 0).all() and wave.isfinite().all()


@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch():
    net, inputs = generator(), draws()
    waves, f0 = net(*inputs)
    for row in range(3):
        wave, own = net(*(x[row : row + 1] for x in inputs))
        assert_close(wave[0], waves[row], rtol=0, atol=1e-9)
        assert_close(own[0], f0[row], rtol=0, atol=1e-9)


def test_f0_learns_from_its_own_loss_alone():
    net = generator()
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


def test_a_residual_block_keeps_the_length():
    x = torch.randn(1, 4, 13)
    assert ResBlock(4, 7, [1, 3, 5])(x).shape == x.shape


# discriminators


def judges():
    torch.manual_seed(0)
    return Discriminators(periods=[2, 3], channels=[2, 4], resolutions=[[256, 64, 256], [128, 32, 100]], spectral_channels=2)


@torch.no_grad()
def test_discriminators_judge_every_row_by_itself():
    net, waves = judges().double(), torch.randn(3, 1999, dtype=torch.float64)
    together = net(waves)
    assert len(together) == 4 and all(x.size(0) == 3 for maps in together for x in maps)
    for row in range(3):
        for ours, theirs in zip(net(waves[row : row + 1]), together, strict=True):
            for alone, rows in zip(ours, theirs, strict=True):
                assert_close(alone[0], rows[row], rtol=0, atol=1e-6)  # spectra are in fp32


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
    net, wave = judges(), torch.randn(1, 2000)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(wave)
    for ours, theirs in zip(found, net(wave), strict=True):
        assert functional.cosine_similarity(ours[-1].float().flatten(), theirs[-1].flatten(), dim=0) > 0.99
