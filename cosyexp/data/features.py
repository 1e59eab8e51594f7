"""From the bytes of an audio file to a wave, and from a wave to F0. S samples, T mel frames."""

import io

import numpy as np
import soundfile
import soxr

LOWEST_RATE = 16000  # Hz: below it an utterance is not fit for training


def read_wave(audio: bytes | str, sample_rate: int) -> np.ndarray:
    """Decodes an audio file (its bytes, or its path) to mono float32 (S,) in [-1, 1] at `sample_rate` Hz.

    Raises ValueError for what is not audio, holds no numbers, is silent, or was recorded below 16 kHz.
    """
    try:
        wave, rate = soundfile.read(
            io.BytesIO(audio) if isinstance(audio, bytes) else audio,
            dtype="float32",
            always_2d=True,
        )
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(
            f"the audio cannot be decoded ({getattr(error, 'error_string', error)})"
        ) from None
    if not np.isfinite(wave).all():
        raise ValueError("the audio has samples that are no numbers")
    if rate < LOWEST_RATE:
        raise ValueError(f"the audio has {rate} Hz, below {LOWEST_RATE}")
    mono = wave.mean(axis=1)
    if not mono.any():
        raise ValueError("the audio is empty or silent")
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate)
    peak = float(np.abs(mono).max())
    return (mono / peak if peak > 1 else mono).astype(np.float32)


def pitch(wave: np.ndarray, sample_rate: int, hop: int, method: str) -> np.ndarray:
    """F0 in Hz, one value a mel frame, (S // hop,) float32; 0 where unvoiced.

    method: "harvest" (the original's choice) or "dio" (twelve times faster), both refined by StoneMask (Morise et al. 2016,
    WORLD). Harvest falls back on dio where it finds fewer than five voiced frames.
    """
    import pyworld

    wave = wave.astype(np.float64)
    period = 1000.0 * hop / sample_rate
    f0, times = getattr(pyworld, method)(wave, sample_rate, frame_period=period)
    if method == "harvest" and np.count_nonzero(f0) < 5:
        f0, times = pyworld.dio(wave, sample_rate, frame_period=period)
    f0 = pyworld.stonemask(wave, f0, times, sample_rate)
    return resize(f0, len(wave) // hop).astype(np.float32)


def resize(x: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation to `size` values, as torch's `interpolate(mode="linear", align_corners=False)`."""
    places = (np.arange(size) + 0.5) * (len(x) / size) - 0.5
    return np.interp(places, np.arange(len(x)), x)
