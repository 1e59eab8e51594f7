"""Distances of speech and bootstrap intervals, at values that are known."""

import math

import numpy as np
import pytest

from cosyexp.data.draws import keyed
from cosyexp.data.features import pitch
from cosyexp.evaluation.scores import Score, summarize
from cosyexp.evaluation.signal import (
    CEPSTRUM,
    mel_cepstral_distortion,
    mel_l1,
    pitch_rmse,
    stft_distances,
    voicing_error,
)

RATE, HOP = 16000, 256
BANDS, FRAMES = 40, 30


def voice(f0: float) -> np.ndarray:
    """Half a second of a harmonic tone, (S,)."""
    time = np.arange(RATE // 2) / RATE
    tone = sum(np.sin(2 * math.pi * n * f0 * time) / n for n in range(1, 20))
    return (0.2 * np.asarray(tone)).astype(np.float32)


def noisy(wave: np.ndarray, decibels: float) -> np.ndarray:
    """Adds white noise at a signal-to-noise ratio."""
    noise = keyed("noise").standard_normal(len(wave), dtype=np.float32)
    power = float(np.square(wave).mean()) / 10 ** (decibels / 10)
    return wave + noise * np.float32(math.sqrt(power))


def test_equal_speech_has_no_distance():
    mel_FT = keyed("mel").standard_normal((BANDS, FRAMES))
    assert mel_l1(mel_FT, mel_FT) == 0 and mel_cepstral_distortion(mel_FT, mel_FT) == 0
    assert stft_distances(voice(150), voice(150)) == (0, 0)
    f0_T = pitch(voice(150), RATE, HOP, "dio")
    assert pitch_rmse(f0_T, f0_T) == 0 and voicing_error(f0_T, f0_T) == 0


@pytest.mark.parametrize("order", [1, 5, CEPSTRUM, CEPSTRUM + 1])
def test_the_distortion_of_a_cosine_is_known(order):
    """One coefficient that differs by a gives 10 / ln 10 * sqrt(2) * a dB."""
    mel_FT = keyed("mel").standard_normal((BANDS, FRAMES))
    centers_F = (np.arange(BANDS) + 0.5) / BANDS
    ripple_FT = mel_FT + 0.3 * np.cos(math.pi * order * centers_F)[:, None]
    wanted = 10 / math.log(10) * math.sqrt(2) * 0.3 if order <= CEPSTRUM else 0
    assert mel_cepstral_distortion(ripple_FT, mel_FT) == pytest.approx(wanted, abs=1e-12)


def test_loudness_is_no_distortion():
    mel_FT = keyed("mel").standard_normal((BANDS, FRAMES))
    assert mel_cepstral_distortion(mel_FT + 2, mel_FT) == pytest.approx(0, abs=1e-12)
    assert mel_l1(mel_FT + 2, mel_FT) == pytest.approx(2)


@pytest.mark.parametrize("method", ["dio", "harvest"])
def test_a_semitone_is_a_hundred_cents(method):
    curves = [
        pitch(voice(150 * 2 ** (semitones / 12)), RATE, HOP, method)[2:-2]  # without its ends
        for semitones in (0, 1, -2)
    ]
    assert pitch_rmse(curves[1], curves[0]) == pytest.approx(100, abs=2)
    assert pitch_rmse(curves[2], curves[0]) == pytest.approx(200, abs=4)


def test_voicing_errors_are_counted():
    f0_T = np.array([0, 0, 100, 100, 100, 0, 0, 0])
    other_T = np.array([0, 100, 100, 100, 0, 0, 0, 0])
    assert voicing_error(other_T, f0_T) == 2 / 8
    assert pitch_rmse(np.zeros(8), f0_T) is None


def test_the_stft_distances_rise_with_noise():
    clean = voice(150)
    found = [stft_distances(noisy(clean, decibels), clean) for decibels in (40, 30, 20, 10)]
    for kind in zip(*found, strict=True):
        assert list(kind) == sorted(kind) and kind[0] > 0


def test_weights_and_logarithms_of_the_mean():
    errors = [Score(0.5, 10), Score(0.0, 30)]
    assert summarize(errors, "wer").mean == pytest.approx(0.125)
    ratios = [Score(0.5), Score(2.0)]
    assert summarize(ratios, "duration_ratio").mean == pytest.approx(1)
    assert summarize(ratios, "other").mean == 1.25


def test_an_interval_holds_the_mean_as_often_as_it_says():
    held, trials = 0, 200
    for trial in range(trials):
        draw = keyed("trial", trial)
        found = summarize([Score(x) for x in draw.normal(3, 1, size=40).tolist()], "x", trial)
        held += found.low <= 3 <= found.high
    assert 0.88 < held / trials < 0.99
    one = summarize([Score(1), Score(2), Score(4)], "x", 0)
    assert one == summarize([Score(1), Score(2), Score(4)], "x", 0)
    assert summarize([Score(2)], "x") == (2, 2, 2, 1)
