"""Measures of a recording: noise, clipping, loudness, bandwidth, silence, F0. S samples,
T frames, C channels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.fft import irfft, rfft

from cosyexp.data.frontends.base import SAMPLE_RATE

HOP = 320  # samples of a frame at 16 kHz, 20 ms
QUIETEST = 0.05  # share of the frames that are taken for noise
SILENCE = -40.0  # dB; a frame so far below the loud ones is silent
LOUD = 0.95  # quantile of the frames' power that is loud
FLAT = 3  # samples in a row at the peak are clipped
BAND = 1e-6  # a frequency counts if its power is above this share of the strongest
LOWEST, HIGHEST = 60, 500  # Hz, of F0
OCTAVE = 0.05  # what a candidate of F0 loses per octave, so that multiples of the period lose
VOICED = 0.5  # autocorrelation at the period of F0, from which a frame is voiced
# Tags and text in brackets, also Chinese and Japanese ones.
BRACKETS = ("<>", r"\[\]", "()", "{}", r"\uff08\uff09", r"\u3010\u3011", r"\uff3b\uff3d")
TAG = re.compile(
    "|".join(f"[{pair[: len(pair) // 2]}][^{pair}]*[{pair[len(pair) // 2 :]}]" for pair in BRACKETS)
)


@dataclass(frozen=True)
class Measure:
    """A number that describes a recording.

    Attributes:
        unit: of the number; empty: a share or a count.
        bad: which values make a recording suspicious.
        step: a difference that matters.
        about: what it is.
    """

    unit: str
    bad: Literal["low", "high", "both"]
    step: float
    about: str


OF_AUDIO: Mapping[str, Measure] = {
    "snr": Measure("dB", "low", 3, "power against that of the quietest 5 % of the 20 ms frames"),
    "clipping": Measure("", "high", 0.0005, "share of the samples that lie flat at the peak"),
    "dc": Measure("", "high", 0.005, "mean of the samples, as a share of full scale"),
    "loudness": Measure("LUFS", "both", 3, "integrated loudness (ITU-R BS.1770-4)"),
    "bandwidth": Measure("Hz", "low", 1000, "highest frequency within 60 dB of the strongest"),
    "silence": Measure("", "high", 0.1, "share of the frames 40 dB below the loud ones"),
    "f0": Measure("Hz", "both", 30, "median F0 of the voiced frames"),
    "f0_low": Measure("Hz", "both", 30, "5 % of the voiced frames have a lower F0"),
    "f0_high": Measure("Hz", "both", 60, "5 % of the voiced frames have a higher F0"),
    "cps": Measure(
        "1/s", "both", 3, "letters and digits of the text per second that is not silent"
    ),
    "wer": Measure("", "high", 0.1, "word error rate of the text against what verify=asr heard"),
}
OF_CORPUS: Mapping[str, Measure] = {
    "speaker_distance": Measure(
        "", "high", 0.5, "distance from the mean embedding of its speaker, whose RMS is 1"
    ),
    "copies": Measure("", "high", 1, "other recordings with the same text"),
    "leak": Measure("", "high", 1, "1 if it is trained on and its text is held out too"),
    "unknown": Measure("", "high", 0.05, "share of the text that the tokenizer does not know"),
    "tags": Measure("", "high", 1, "tags and brackets in the text"),
}
MEASURES: Mapping[str, Measure] = {
    "seconds": Measure("s", "both", 3, "length"),
    **OF_AUDIO,
    **OF_CORPUS,
}


def measure(samples_SC: np.ndarray, sample_rate: int, speech_S: np.ndarray) -> dict[str, float]:
    """Measures the audio of a recording.

    Args:
        samples_SC: as recorded.
        sample_rate: of `samples_SC`, in Hz.
        speech_S: the same at 16 kHz, mixed to mono.

    Returns:
        The values of `OF_AUDIO` that do not need the text; no F0 if no frame is voiced.
    """
    wave_S = samples_SC.mean(1)
    power_T = frame_power(speech_S)
    f0 = voiced_f0(speech_S)
    low, middle, high = np.quantile(f0, (0.05, 0.5, 0.95)) if len(f0) else (np.nan,) * 3
    values = {
        "snr": snr(power_T),
        "clipping": clipping(samples_SC.T.ravel()),
        "dc": abs(float(wave_S.mean())),
        "loudness": loudness(wave_S, sample_rate),
        "bandwidth": bandwidth(wave_S, sample_rate),
        "silence": float(1 - loud_frames(power_T).mean()),
        "f0": middle,
        "f0_low": low,
        "f0_high": high,
    }
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def frame_power(speech_S: np.ndarray) -> np.ndarray:
    """Returns the mean square of each frame of 20 ms of a waveform at 16 kHz, (T,)."""
    frames_TS = speech_S[: len(speech_S) // HOP * HOP].reshape(-1, HOP)
    return np.asarray(np.square(frames_TS).mean(1, dtype=np.float64)) + 1e-12


def loud_frames(power_T: np.ndarray) -> np.ndarray:
    """Returns which frames are not silent, (T,) bool."""
    return np.asarray(power_T > np.quantile(power_T, LOUD) * 10 ** (SILENCE / 10))


def snr(power_T: np.ndarray) -> float:
    """Returns the signal-to-noise ratio in dB, with the quietest frames as the noise."""
    noise = np.sort(power_T)[: max(int(len(power_T) * QUIETEST), 1)].mean()
    return float(10 * np.log10(max(power_T.mean() / noise - 1, 1e-3)))


def clipping(wave_S: np.ndarray) -> float:
    """Returns the share of samples in runs of at least `FLAT` within 0.1 % of the peak."""
    magnitude = np.abs(wave_S)
    flat = np.concatenate([[0], magnitude >= 0.999 * magnitude.max(), [0]])
    edges = np.flatnonzero(np.diff(flat))
    runs = edges[1::2] - edges[::2]
    return float(runs[runs >= FLAT].sum() / len(wave_S))


@cache
def k_weighting(size: int, sample_rate: int) -> np.ndarray:
    """Returns the power response of BS.1770's K-weighting at the bins of an FFT, float32.

    The standard gives its high shelf and its high pass for 48 kHz; these are the same at any rate,
    from their analog prototypes by the bilinear transform.
    """
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)

    def under(k: float, quality: float) -> np.ndarray:
        return 1 + k / quality + k**2 + 2 * (k**2 - 1) * z + (1 - k / quality + k**2) * z**2

    k, quality, gain = np.tan(np.pi * 1681.974 / sample_rate), 0.7071752, 10 ** (3.999844 / 20)
    slope = np.sqrt(gain) * k / quality
    over = gain + slope + k**2 + 2 * (k**2 - gain) * z + (gain - slope + k**2) * z**2
    shelf = over / under(k, quality)
    k, quality = np.tan(np.pi * 38.13547 / sample_rate), 0.5003270
    high_pass = (1 + k / quality + k**2) * (1 - z) ** 2 / under(k, quality)
    return np.square(np.abs(shelf * high_pass)).astype(np.float32)


def loudness(wave_S: np.ndarray, sample_rate: int) -> float:
    """Returns the integrated loudness in LUFS (ITU-R BS.1770-4), at least -70.

    The weighting is applied to the spectra of steps of 100 ms; blocks of four steps are gated.
    """
    step = min(sample_rate // 10, len(wave_S))
    spectra = rfft(wave_S[: len(wave_S) // step * step].reshape(-1, step), axis=1)
    weighted = np.square(np.abs(spectra)) @ k_weighting(step, sample_rate)
    steps = 2 * weighted.astype(np.float64) / step**2
    blocks = np.convolve(steps, np.full(min(4, len(steps)), 1 / min(4, len(steps))), "valid")
    blocks = blocks[blocks > 10 ** ((0.691 - 70) / 10)]
    if not len(blocks):
        return -70.0
    return float(10 * np.log10(blocks[blocks > 0.1 * blocks.mean()].mean()) - 0.691)


def bandwidth(wave_S: np.ndarray, sample_rate: int, size: int = 1024) -> float:
    """Returns the highest frequency in Hz whose mean power is within 60 dB of the strongest."""
    size = min(size, len(wave_S))
    window = np.hanning(size).astype(np.float32)
    frames_TS = wave_S[: len(wave_S) // size * size].reshape(-1, size) * window
    power = np.square(np.abs(rfft(frames_TS, axis=1))).mean(0)
    return float(np.flatnonzero(power >= BAND * power.max())[-1] * sample_rate / size)


def voiced_f0(speech_S: np.ndarray) -> np.ndarray:
    """Returns F0 in Hz of the voiced frames, by autocorrelation (Boersma 1993), (voiced,).

    It is made for statistics: the octave of single frames may be wrong.
    """
    rate, size = SAMPLE_RATE // 2, 512
    x = speech_S[: len(speech_S) // 2 * 2].reshape(-1, 2).mean(1)
    if len(x) < size:
        return np.empty(0)
    frames_TS = np.lib.stride_tricks.sliding_window_view(x, size)[:: size // 2]
    window = np.hanning(size).astype(np.float32)
    frames_TS = (frames_TS - frames_TS.mean(1, keepdims=True)) * window
    frames_TS = frames_TS[loud_frames(np.square(frames_TS).mean(1) + 1e-12)]
    correlation = irfft(np.square(np.abs(rfft(frames_TS, 2 * size, axis=1))), axis=1)
    correlation = correlation[:, : rate // LOWEST + 2] / (correlation[:, :1] + 1e-12)
    own = irfft(np.square(np.abs(rfft(window, 2 * size))))[: correlation.shape[1]]
    correlation *= own[0] / own
    first = rate // HIGHEST
    cost = OCTAVE * np.log2(np.arange(first, rate // LOWEST))
    lag = (correlation[:, first : rate // LOWEST] - cost).argmax(1) + first
    rows = np.arange(len(lag))
    before, at, after = (correlation[rows, lag + shift] for shift in (-1, 0, 1))
    peak = (at >= before) & (at >= after) & (at > VOICED)
    bend = np.where(peak, before - 2 * at + after, -1.0)
    return np.asarray(rate / (lag + 0.5 * (before - after) / bend)[peak])


def letters(text: str) -> int:
    """Returns the number of letters and digits of a text."""
    return sum(map(str.isalnum, text))
