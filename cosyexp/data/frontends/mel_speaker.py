"""Speaker embeddings without a trained network: statistics of a log-mel spectrogram.

S samples, F mel bands, T mel frames, E speaker embedding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd, Wanted
from cosyexp.errors import UserError
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.registry import register
from cosyexp.run.files import replacement
from cosyexp.run.tensors import TensorFile, save_tensors


@cache
def spectrogram() -> MelSpectrogram:
    """Returns the mel spectrogram module, built once per process."""
    return MelSpectrogram(sample_rate=SAMPLE_RATE, n_fft=1024, hop=256, win=1024, bins=80)


def statistics(wave: np.ndarray) -> Tensor:
    """Returns mean, standard deviation and mean absolute change of each mel band, (3F,).

    Args:
        wave: (S,) at 16 kHz.

    Raises:
        ValueError: if the waveform is too short.
    """
    if len(wave) < 2048:
        raise ValueError(
            f"the audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speaker embedding"
        )
    mel_FT = spectrogram()(torch.from_numpy(wave)[None])[0]
    return torch.cat([mel_FT.mean(1), mel_FT.std(1), mel_FT.diff(dim=1).abs().mean(1)])


@dataclass(frozen=True)
class MelSpeakerEncoder(FrontEnd):
    """Speaker encoder that standardizes the statistics and projects them to the embedding.

    Attributes:
        mean: of the statistics, (3F,).
        std: standard deviation of the statistics, (3F,).
        projection: random matrix with orthonormal columns, (3F, E).
    """

    mean: Tensor
    std: Tensor
    projection: Tensor

    @classmethod
    def fit(cls, waves: Iterable[np.ndarray], *, width: int, seed: int) -> "MelSpeakerEncoder":
        """Fits mean and standard deviation to waveforms, and draws the projection.

        Args:
            waves: (S,) each, at 16 kHz.
            width: E.
            seed: seed of the projection.
        """
        each = torch.stack([statistics(wave) for wave in waves])
        random = torch.randn(each.size(1), width, generator=torch.Generator().manual_seed(seed))
        std = each.std(0).nan_to_num(1.0).clamp(min=1e-3)
        # Contiguous, as a loaded one: another memory order gives other last bits.
        return cls(each.mean(0), std, torch.linalg.qr(random).Q.contiguous())

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """Returns the speaker embedding (E,) of a waveform (S,) at 16 kHz."""
        return (((statistics(wave) - self.mean) / self.std) @ self.projection).numpy()

    def save(self, path: Path) -> None:
        """Writes statistics and projection into a safetensors file."""
        with replacement(path) as part:
            save_tensors(part, {"mean": self.mean, "std": self.std, "projection": self.projection})

    @classmethod
    def load(cls, path: Path) -> "MelSpeakerEncoder":
        """Reads the file that `save` wrote.

        Raises:
            UserError: the file is damaged.
        """
        with TensorFile(path) as file:
            try:
                return cls(file["mean"], file["std"], file["projection"])
            except KeyError:
                raise UserError(f"{path} is damaged: prepare in another folder") from None


@register("front_end")
@dataclass(frozen=True, kw_only=True)
class MelStatistics:
    """Recipe of a `MelSpeakerEncoder`, without settings."""

    @property
    def key(self) -> str:
        """The settings."""
        return repr(self)

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> MelSpeakerEncoder:
        """Fits the encoder with the embedding size of the family."""
        return MelSpeakerEncoder.fit(waves, width=wanted.speaker_dim, seed=wanted.seed)

    def load(self, path: Path, wanted: Wanted) -> MelSpeakerEncoder:
        """Loads a fitted encoder."""
        return MelSpeakerEncoder.load(path)
