"""Collator of the vocoder, which reads segments of a waveform with their mel spectrogram and F0.

B batch, F mel bands, T mel frames of a segment, S samples of a segment, H harmonics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.batch import Batch
from cosyexp.data.collators.base import Row
from cosyexp.data.draws import Draws
from cosyexp.data.fields import F0, Field, Mel, Wave
from cosyexp.registry import register


@dataclass(frozen=True, kw_only=True)
class VocoderBatch(Batch):
    """Batch of segments of one size, with the random numbers of each row.

    Attributes:
        wave_BS: waveform, in [-1, 1].
        mel_BFT: log-mel spectrogram.
        f0_BT: F0 in Hz, 0 where unvoiced.
        phase_BH: initial phase of each harmonic of the source, in radians; 0 for the first.
        noise_BHS: standard normal noise of the source.
    """

    wave_BS: Tensor
    mel_BFT: Tensor
    f0_BT: Tensor
    phase_BH: Tensor
    noise_BHS: Tensor


@register("collator")
class VocoderCollator:
    """Makes batches of the vocoder: one random segment of each utterance in each epoch.

    Segments begin at whole mel frames. Mel and F0 are computed from the whole utterance, then cut.
    The cost of a row is the number of frames of a segment.

    Args:
        sample_rate: of the audio, in Hz.
        mel: the other settings of the field `Mel`.
        pitch: method of F0 estimation, see `features.pitch`.
        segment: size of a segment in samples, a multiple of the hop.
        harmonics: number of harmonics of the source, the fundamental included.

    Raises:
        ValueError: if `segment` is not a multiple of the hop.
    """

    def __init__(
        self, *, sample_rate: int, mel: Mapping[str, Any], pitch: str, segment: int, harmonics: int
    ) -> None:
        self.hop = int(mel["hop"])
        if segment % self.hop:
            raise ValueError(
                f"segment={segment} is not a multiple of the hop of {self.hop} samples"
            )
        self.frames, self.harmonics = segment // self.hop, harmonics
        self.mel = Mel(sample_rate=sample_rate, **mel)
        self.fields: Mapping[str, Field] = {
            "wave": Wave(sample_rate),
            "mel": self.mel,
            "f0": F0(sample_rate, self.hop, pitch),
        }

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the number of mel frames of a segment for each row."""
        return np.full_like(sizes["mel"], self.frames)

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> VocoderBatch:
        """Cuts a segment out of each row and draws its random numbers."""
        wave, mel, f0, phase, noise = zip(
            *(self._segment(row, utt, draws) for utt, row in zip(utts, rows, strict=True)),
            strict=True,
        )
        return VocoderBatch(
            utts=tuple(utts),
            wave_BS=torch.from_numpy(np.stack(wave)),
            mel_BFT=torch.from_numpy(np.stack(mel)),
            f0_BT=torch.from_numpy(np.stack(f0)),
            phase_BH=torch.from_numpy(np.stack(phase)),
            noise_BHS=torch.from_numpy(np.stack(noise)),
        )

    def _segment(self, row: Row, utt: str, draws: Draws) -> tuple[np.ndarray, ...]:
        size, hop = self.frames, self.hop
        start = int(draws(utt, "crop").integers(max(row["mel"].shape[1] - size, 0) + 1))
        wave = row["wave"][0, start * hop : (start + size) * hop].astype(np.float32) / 32767
        mel, f0 = row["mel"][:, start : start + size], row["f0"][0, start : start + size]
        phase = draws(utt, "phase").uniform(-math.pi, math.pi, self.harmonics).astype(np.float32)
        phase[0] = 0
        return (
            np.pad(wave, (0, size * hop - len(wave))),
            np.pad(mel, ((0, 0), (0, size - mel.shape[1])), constant_values=self.mel.silence),
            # `Mel.align` can make the mel longer than F0, so that their padding differs.
            np.pad(f0, (0, size - len(f0))),
            phase,
            draws(utt, "noise").standard_normal((self.harmonics, size * hop), dtype=np.float32),
        )
