"""Pieces of a waveform: how they are joined, and written while more are made. S samples."""

import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from cosyexp.run.files import create, make_folder, replace_file

FADE = 0.005  # seconds


def fade(wave_S: np.ndarray, sample_rate: int, start: bool, end: bool) -> np.ndarray:
    """Returns a waveform that begins or ends at zero, so that it is joined without a click.

    Args:
        wave_S: in [-1, 1].
        sample_rate: in Hz.
        start: whether to fade in.
        end: whether to fade out.
    """
    size = min(round(FADE * sample_rate), len(wave_S))
    ramp, faded = np.linspace(0, 1, size, dtype=wave_S.dtype), np.array(wave_S)
    if start:
        faded[:size] *= ramp
    if end:
        faded[len(faded) - size :] *= ramp[::-1]
    return faded


def join(waves: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
    """Joins the waveforms of the pieces of a text."""
    last = len(waves) - 1
    return np.concatenate(
        [fade(wave, sample_rate, i > 0, i < last) for i, wave in enumerate(waves)]
    )


def write_wav(path: Path, wave_S: np.ndarray, sample_rate: int) -> None:
    """Writes a waveform in [-1, 1] as a WAV file with 16 bits per sample, atomically."""
    samples = pcm(wave_S)
    with replace_file(path) as file:
        file.write(header(len(samples), sample_rate) + samples)


def write_growing_wav(path: Path, waves: Iterable[np.ndarray], sample_rate: int) -> int:
    """Writes a WAV file piece by piece; it is complete after each of them.

    Args:
        path: of the file, which replaces an earlier one when the first piece is there.
        waves: (S,) each, in [-1, 1].
        sample_rate: in Hz.

    Returns:
        The number of samples.
    """
    pieces, written = iter(waves), 0
    first = next(pieces)
    make_folder(path.parent)
    with create(path) as file:
        for wave in chain([first], pieces):
            samples = pcm(wave)
            file.seek(len(header(0, sample_rate)) + written)
            file.write(samples)
            written += len(samples)
            file.seek(0)
            file.write(header(written, sample_rate))
            file.flush()
    return written // 2


def pcm(wave_S: np.ndarray) -> bytes:
    """Returns samples in [-1, 1] as 16-bit integers."""
    return np.round(np.clip(wave_S, -1, 1) * 32767).astype("<i2").tobytes()


def header(size: int, sample_rate: int) -> bytes:
    """Returns the header of a mono WAV file with `size` bytes of 16-bit samples."""
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return riff + form + struct.pack("<4sI", b"data", size)
