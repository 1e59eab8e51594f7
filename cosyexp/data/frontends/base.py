"""What turns a wave into speech tokens or a speaker embedding. To add one: a class like those beside this file, and a YAML in its group."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

SAMPLE_RATE = 16000  # Hz, of the waves that front ends take


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """token_rate: tokens a second. codes: how many different ones the family knows. speaker_dim: numbers of a speaker embedding."""

    token_rate: int
    codes: int
    speaker_dim: int
    seed: int = 0


class FrontEnd:
    """Base of those that are ready; they are pickled to the processes that use them. `longest`: seconds that one takes at most."""

    longest: ClassVar[float] = math.inf

    def encode(self, wave: np.ndarray) -> Sequence[float] | np.ndarray:
        """Of a wave (S,) at 16 kHz; ValueError where it cannot."""
        raise NotImplementedError

    def encode_all(self, waves: Sequence[np.ndarray]) -> list[Sequence[float] | np.ndarray]:
        return [self.encode(wave) for wave in waves]

    def save(self, path: Path) -> None:
        """Keeps beside the data what was fitted, if anything was: whole, or not at all."""


class Recipe(Protocol):
    """How a front end comes to be: a node of the config."""

    @property
    def key(self) -> str:
        """What its numbers depend on."""
        ...

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> FrontEnd:
        """Of waves of the training split, which may be gone through several times."""
        ...

    def load(self, path: Path, wanted: Wanted) -> FrontEnd:
        """What `save` kept."""
        ...
