"""Audio features: an audio file to a waveform, and a waveform to F0. S samples, T mel frames."""

import io
from typing import Any

import numpy as np
import soxr

from cosyexp.data.audio import decode, open_audio
from cosyexp.errors import UserError

LOWEST_RATE = 16000  # Hz; recordings at a lower rate are not fit for training
SPEED = 2.5  # of the audio that the method "fast" gives to harvest


def read_wave(audio: bytes | str, sample_rate: int) -> np.ndarray:
    """Decodes an audio file to a mono waveform.

    Args:
        audio: bytes of the file, or its path.
        sample_rate: of the waveform, in Hz; the audio is resampled to it.

    Returns:
        (S,) float32 in [-1, 1].

    Raises:
        ValueError: if the file is not audio, has samples that are not finite, is empty or silent,
            or was recorded below 16 kHz.
    """
    with open_audio(io.BytesIO(audio) if isinstance(audio, bytes) else audio) as file:
        check_rate(file.samplerate)
        return mono(decode(file), file.samplerate, sample_rate)


def check_rate(rate: int) -> None:
    """Checks that audio was recorded at 16 kHz or more; raises a ValueError otherwise."""
    if rate < LOWEST_RATE:
        raise ValueError(f"the audio has {rate} Hz, below {LOWEST_RATE}")


def mono(samples: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Mixes the channels and resamples.

    Args:
        samples: (S, C).
        rate: their rate, in Hz.
        sample_rate: of the waveform, in Hz.

    Returns:
        (S,) float32 in [-1, 1].

    Raises:
        ValueError: if samples are not finite, or all are zero.
    """
    if not np.isfinite(samples).all():
        raise ValueError("the audio has samples that are not finite")
    wave = samples.mean(axis=1)
    if not wave.any():
        raise ValueError("the audio is empty or silent")
    if rate != sample_rate:
        wave = soxr.resample(wave, rate, sample_rate)
    peak = float(np.abs(wave).max())
    return (wave / peak if peak > 1 else wave).astype(np.float32)


def pitch(wave: np.ndarray, sample_rate: int, hop: int, method: str) -> np.ndarray:
    """Estimates F0 with WORLD (Morise et al. 2016), one value per mel frame.

    Args:
        wave: (S,) in [-1, 1].
        sample_rate: of the waveform, in Hz.
        hop: samples of a mel frame.
        method: "harvest", the choice of the original CosyVoice; "fast", harvest on audio that is
            played faster, which takes a quarter of the time; or "dio", a 25th of it. All are
            refined by StoneMask. Harvest falls back on dio where it finds fewer than five voiced
            frames.

    Returns:
        (S // hop,) float32 in Hz, 0 where unvoiced.

    Raises:
        UserError: the method is none of them.
    """
    import pyworld

    methods: dict[str, Any] = {
        "harvest": pyworld.harvest,
        "fast": fast_harvest,
        "dio": pyworld.dio,
    }
    if method not in methods:
        raise UserError(f"family.pitch={method} is not a method of F0: give harvest, fast or dio")

    wave = wave.astype(np.float64)
    period = 1000.0 * hop / sample_rate
    f0, times = methods[method](wave, sample_rate, frame_period=period)
    if method != "dio" and np.count_nonzero(f0) < 5:
        f0, times = pyworld.dio(wave, sample_rate, frame_period=period)
    f0 = pyworld.stonemask(wave, f0, times, sample_rate)
    return resize(f0, len(wave) // hop).astype(np.float32)


def fast_harvest(
    wave: np.ndarray, sample_rate: int, frame_period: float
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates F0 with harvest on audio that is played `SPEED` times faster.

    Harvest works in steps of 1 ms, so it takes fewer of them, with shorter windows.

    Args:
        wave: (S,) float64.
        sample_rate: in Hz.
        frame_period: milliseconds between two values.

    Returns:
        F0 in Hz, and the times in seconds, both (values,).
    """
    import pyworld

    f0, times = pyworld.harvest(
        soxr.resample(wave, sample_rate, round(16000 / SPEED)),
        16000,
        f0_floor=pyworld.default_f0_floor * SPEED,
        f0_ceil=pyworld.default_f0_ceil * SPEED,
        frame_period=frame_period / SPEED,
    )
    return f0 / SPEED, times * SPEED


def resize(x: np.ndarray, size: int) -> np.ndarray:
    """Interpolates linearly to `size` values.

    Gives the numbers of torch's `interpolate(mode="linear", align_corners=False)`.
    """
    positions = (np.arange(size) + 0.5) * (len(x) / size) - 0.5
    return np.interp(positions, np.arange(len(x)), x)
