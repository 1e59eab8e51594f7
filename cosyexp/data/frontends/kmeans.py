"""Speech tokens without a trained network: the nearest of K centroids of log-mel frames. T token frames, F mel bands."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.draws import keyed
from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd, Wanted
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.run.files import replacement
from cosyexp.run.tensors import TensorFile, save_tensors

ROUNDS = 20  # of Lloyd's algorithm


@dataclass(frozen=True)
class Frames:
    """Log-mel frames at the rate of the tokens, less their mean over the utterance, so that voices can share tokens."""

    rate: int

    @cached_property
    def _mel(self) -> MelSpectrogram:
        return MelSpectrogram(
            sample_rate=SAMPLE_RATE, n_fft=1024, hop=SAMPLE_RATE // self.rate, win=1024, bins=80
        )

    def __call__(self, wave: np.ndarray) -> Tensor:
        """(T, F) of a wave (S,); ValueError where it is too short for one frame."""
        if len(wave) < 1024:
            raise ValueError(
                f"its audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speech token"
            )
        frames_TF = self._mel(torch.from_numpy(wave)[None])[0].T
        return frames_TF - frames_TF.mean(0)


@dataclass(frozen=True)
class KMeansTokenizer(FrontEnd):
    """codes_KF: the centroids of K tokens. rate: tokens a second."""

    codes_KF: Tensor
    rate: int

    @classmethod
    def fit(
        cls, waves: Iterable[np.ndarray], *, codes: int, rate: int, seed: int
    ) -> "KMeansTokenizer":
        """Lloyd's algorithm (1982) over the frames of all waves; a centroid that no frame is near to moves to a random frame."""
        frames = Frames(rate)
        x_NF = torch.cat([frames(wave) for wave in waves])
        draw = keyed(seed, "k-means")
        centroids = x_NF[torch.from_numpy(draw.permutation(len(x_NF))[:codes])]
        if len(centroids) < codes:
            raise ValueError(f"{len(x_NF)} frames are too few for {codes} speech tokens")
        for _ in range(ROUNDS):
            owner = nearest(x_NF, centroids)
            count = torch.bincount(owner, minlength=codes)
            sums = torch.zeros_like(centroids).index_add_(0, owner, x_NF)
            centroids = sums / count.clamp(min=1).unsqueeze(1)
            lonely = torch.flatten((count == 0).nonzero())
            centroids[lonely] = x_NF[torch.from_numpy(draw.integers(len(x_NF), size=len(lonely)))]
        return cls(centroids, rate)

    def encode(self, wave: np.ndarray) -> list[int]:
        """The token ids of a wave (S,) at 16 kHz."""
        tokens: list[int] = nearest(Frames(self.rate)(wave), self.codes_KF).tolist()
        return tokens

    def save(self, path: Path) -> None:
        with replacement(path) as part:
            save_tensors(part, {"codes": self.codes_KF}, {"rate": str(self.rate)})

    @classmethod
    def load(cls, path: Path) -> "KMeansTokenizer":
        with TensorFile(path) as file:
            return cls(file["codes"], int(file.metadata["rate"]))


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """codes: how many different tokens, at most those of the family."""

    codes: int = 512

    @property
    def key(self) -> str:
        return repr(self)

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> KMeansTokenizer:
        return KMeansTokenizer.fit(
            waves, codes=min(self.codes, wanted.codes), rate=wanted.token_rate, seed=wanted.seed
        )

    def load(self, path: Path, wanted: Wanted) -> KMeansTokenizer:
        return KMeansTokenizer.load(path)


def nearest(x_NF: Tensor, centroids_KF: Tensor) -> Tensor:
    """(N,) the number of the nearest centroid of each row."""
    half_norms = centroids_KF.square().sum(1) / 2
    return torch.cat([(part @ centroids_KF.T - half_norms).argmax(1) for part in x_NF.split(8192)])
