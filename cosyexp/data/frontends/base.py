"""The front-end protocol: what encodes a waveform as speech tokens or as a speaker embedding.

To add a front end, write a class as in the other modules of this package, and a YAML in its config
group.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

SAMPLE_RATE = 16000  # Hz, of the waveforms that front ends take


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a family requires of its front ends.

    Attributes:
        token_rate: speech tokens per second.
        codes: number of different speech tokens.
        speaker_dim: size of a speaker embedding.
        seed: seed of front ends that are fitted.
    """

    token_rate: int
    codes: int
    speaker_dim: int
    seed: int = 0


class FrontEnd:
    """Base class of front ends that are ready to encode.

    They are pickled to the processes that use them.

    Attributes:
        longest: maximum length in seconds of the waveforms that it takes.
    """

    longest: ClassVar[float] = math.inf

    def encode(self, wave: np.ndarray) -> Sequence[float] | np.ndarray:
        """Encodes a waveform as speech tokens, (tokens,), or as an embedding, (speaker_dim,).

        Args:
            wave: (S,) at 16 kHz, in [-1, 1].

        Raises:
            ValueError: if the waveform cannot be encoded, with the reason as the message.
            NotImplementedError: if a subclass does not override this method.
        """
        raise NotImplementedError

    def encode_all(self, waves: Sequence[np.ndarray]) -> list[Sequence[float] | np.ndarray]:
        """Encodes several waveforms, as a batch where the front end can."""
        return [self.encode(wave) for wave in waves]

    def save(self, path: Path) -> None:
        """Writes what was fitted to a file, complete or not at all; by default nothing."""


class Recipe(Protocol):
    """Protocol of front ends in the config, which fit or load a `FrontEnd`."""

    @property
    def key(self) -> str:
        """A string that changes when the numbers of the front end do."""
        ...

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> FrontEnd:
        """Returns a front end that is fitted on waveforms of the training split.

        Args:
            waves: (S,) each, at 16 kHz; may be iterated over several times.
            wanted: what the family requires.
        """
        ...

    def load(self, path: Path, wanted: Wanted) -> FrontEnd:
        """Returns the front end that `FrontEnd.save` wrote."""
        ...
