"""A speaker embedding without a trained network: statistics of a log-mel spectrogram. E embedding, F mel bands."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd, Wanted
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.run.files import replacement
from cosyexp.run.tensors import TensorFile, save_tensors


@cache
def spectrogram() -> MelSpectrogram:
    return MelSpectrogram(sample_rate=SAMPLE_RATE, n_fft=1024, hop=256, win=1024, bins=80)


def statistics(wave: np.ndarray) -> Tensor:
    """(3F,) mean, standard deviation and mean absolute change of each band; ValueError where the wave is too short."""
    if len(wave) < 2048:
        raise ValueError(
            f"its audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speaker embedding"
        )
    mel_FT = spectrogram()(torch.from_numpy(wave)[None])[0]
    return torch.cat([mel_FT.mean(1), mel_FT.std(1), mel_FT.diff(dim=1).abs().mean(1)])


@dataclass(frozen=True)
class MelSpeakerEncoder(FrontEnd):
    """Standardised statistics, turned into E numbers by a random projection of orthonormal columns."""

    mean: Tensor
    std: Tensor
    projection: Tensor

    @classmethod
    def fit(cls, waves: Iterable[np.ndarray], *, width: int, seed: int) -> "MelSpeakerEncoder":
        """Takes mean and deviation from the waves."""
        each = torch.stack([statistics(wave) for wave in waves])
        random = torch.randn(each.size(1), width, generator=torch.Generator().manual_seed(seed))
        std = each.std(0).nan_to_num(1.0).clamp(min=1e-3)
        return cls(
            each.mean(0), std, torch.linalg.qr(random).Q.contiguous()
        )  # as a loaded one: another order, other last bits

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """(E,) of a wave (S,) at 16 kHz."""
        return (((statistics(wave) - self.mean) / self.std) @ self.projection).numpy()

    def save(self, path: Path) -> None:
        with replacement(path) as part:
            save_tensors(part, {"mean": self.mean, "std": self.std, "projection": self.projection})

    @classmethod
    def load(cls, path: Path) -> "MelSpeakerEncoder":
        with TensorFile(path) as file:
            return cls(file["mean"], file["std"], file["projection"])


@dataclass(frozen=True, kw_only=True)
class MelStatistics:
    """Has nothing to set."""

    @property
    def key(self) -> str:
        return repr(self)

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> MelSpeakerEncoder:
        return MelSpeakerEncoder.fit(waves, width=wanted.speaker_dim, seed=wanted.seed)

    def load(self, path: Path, wanted: Wanted) -> MelSpeakerEncoder:
        return MelSpeakerEncoder.load(path)
