"""Speech tokens without a trained network: the nearest of K centroids of log-mel frames.

S samples, T token frames, F mel bands, N frames of all waveforms, K centroids.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.draws import keyed
from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd, Wanted
from cosyexp.errors import UserError
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.registry import register
from cosyexp.run.files import replacement
from cosyexp.run.tensors import TensorFile, save_tensors

ROUNDS = 20  # iterations of Lloyd's algorithm


@dataclass(frozen=True)
class Frames:
    """Log-mel frames at the token rate, less their mean over the utterance.

    Without the mean, different voices can share tokens.

    Attributes:
        rate: frames per second.
    """

    rate: int

    @cached_property
    def _mel(self) -> MelSpectrogram:
        return MelSpectrogram(
            sample_rate=SAMPLE_RATE, n_fft=1024, hop=SAMPLE_RATE // self.rate, win=1024, bins=80
        )

    def __call__(self, wave: np.ndarray) -> Tensor:
        """Returns the frames (T, F) of a waveform (S,) at 16 kHz.

        Raises:
            ValueError: if the waveform is too short for one frame.
        """
        if len(wave) < 1024:
            raise ValueError(
                f"the audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speech token"
            )
        frames_TF = self._mel(torch.from_numpy(wave)[None])[0].T
        return frames_TF - frames_TF.mean(0)


@dataclass(frozen=True)
class KMeansTokenizer(FrontEnd):
    """Speech tokenizer whose tokens are the nearest centroids of log-mel frames.

    Attributes:
        codes_KF: centroids of the K tokens.
        rate: tokens per second.
    """

    codes_KF: Tensor
    rate: int

    @classmethod
    def fit(
        cls, waves: Iterable[np.ndarray], *, codes: int, rate: int, seed: int
    ) -> "KMeansTokenizer":
        """Fits the centroids to the frames of all waveforms (Lloyd 1982).

        A centroid that is nearest to no frame moves to a random frame.

        Args:
            waves: (S,) each, at 16 kHz.
            codes: K.
            rate: tokens per second.
            seed: seed of the initial centroids.

        Raises:
            ValueError: if there are fewer frames than centroids.
        """
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
            empty = torch.flatten((count == 0).nonzero())
            centroids[empty] = x_NF[torch.from_numpy(draw.integers(len(x_NF), size=len(empty)))]
        return cls(centroids, rate)

    def encode(self, wave: np.ndarray) -> list[int]:
        """Returns the token ids of a waveform (S,) at 16 kHz."""
        tokens: list[int] = nearest(Frames(self.rate)(wave), self.codes_KF).tolist()
        return tokens

    def save(self, path: Path) -> None:
        """Writes the centroids into a safetensors file."""
        with replacement(path) as part:
            save_tensors(part, {"codes": self.codes_KF}, {"rate": str(self.rate)})

    @classmethod
    def load(cls, path: Path) -> "KMeansTokenizer":
        """Reads the file that `save` wrote.

        Raises:
            UserError: the file is damaged.
        """
        with TensorFile(path) as file:
            try:
                return cls(file["codes"], int(file.metadata["rate"]))
            except (KeyError, ValueError):
                raise UserError(f"{path} is damaged: prepare in another folder") from None


@register("front_end")
@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Recipe of a `KMeansTokenizer`.

    Attributes:
        codes: number of different speech tokens, limited to those of the family.
    """

    codes: int = 512

    @property
    def key(self) -> str:
        """The settings."""
        return repr(self)

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> KMeansTokenizer:
        """Fits the tokenizer at the token rate of the family."""
        return KMeansTokenizer.fit(
            waves, codes=min(self.codes, wanted.codes), rate=wanted.token_rate, seed=wanted.seed
        )

    def load(self, path: Path, wanted: Wanted) -> KMeansTokenizer:
        """Loads a fitted tokenizer."""
        return KMeansTokenizer.load(path)


def nearest(x_NF: Tensor, centroids_KF: Tensor) -> Tensor:
    """Returns the index of the nearest centroid of each row, (N,)."""
    half_norms = centroids_KF.square().sum(1) / 2
    return torch.cat([(part @ centroids_KF.T - half_norms).argmax(1) for part in x_NF.split(8192)])
