"""One row of a shard, with checks of the columns that are read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cosyexp.data import features

LACKS = "it has no "  # how the reason begins for a column that is missing, null or empty


class Utterance:
    """One row of a shard, whose audio is decoded once.

    Args:
        row: the values of the row, by column.

    Raises:
        ValueError: if a column that is read is missing, null or empty, or has unusable values.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self._waves: dict[int, np.ndarray] = {}

    def __getitem__(self, column: str) -> Any:
        value = self.row.get(column)
        if value is None or (hasattr(value, "__len__") and len(value) == 0):
            raise ValueError(f"{LACKS}{column}")
        return value

    def numbers(self, column: str) -> np.ndarray:
        """Returns a column that has a list of numbers, or the bytes of a float32 array, (size,).

        Raises:
            ValueError: if the column has anything else, or numbers that are not finite.
        """
        value = self[column]
        try:
            numbers = (
                np.frombuffer(value, np.float32) if isinstance(value, bytes) else np.array(value)
            )
        except ValueError:  # ragged lists, or bytes that are not a multiple of four
            raise ValueError(f"the {column} is not a list of numbers") from None
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
            raise ValueError(f"the {column} is not a list of finite numbers")
        return numbers

    def wave(self, sample_rate: int) -> np.ndarray:
        """Returns the audio as mono float32 in [-1, 1], (samples,).

        It is rounded to 16 bits, so that a cached waveform equals a computed one.

        Args:
            sample_rate: of the waveform, in Hz; the audio is resampled to it.

        Raises:
            ValueError: if the audio cannot be decoded or is not fit for training.
        """
        if sample_rate not in self._waves:
            audio = self["audio_data"]
            # soundfile would take a number for the descriptor of an open file.
            if not isinstance(audio, bytes | str):
                raise ValueError("the audio_data is not the bytes of an audio file")
            wave = features.read_wave(audio, sample_rate)
            self._waves[sample_rate] = (
                np.round(wave * 32767).astype(np.int16).astype(np.float32) / 32767
            )
        return self._waves[sample_rate]
