"""The judge protocol.

To add a judge, write a class as those in this package, and a YAML in `conf/judge/`.

S samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cosyexp.evaluation.scores import Score


@dataclass(frozen=True)
class Speech:
    """Speech to rate.

    Attributes:
        wave_S: the waveform, in [-1, 1].
        sample_rate: in Hz.
        text: what it should say.
        reference_S: a recording of the speaker at the same rate; None if the speech is that.
    """

    wave_S: np.ndarray
    sample_rate: int
    text: str
    reference_S: np.ndarray | None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a piece of speech.

    Attributes:
        scores: by metric; those that cannot be measured are left out.
        notes: texts that explain them, by name, such as what was heard.
    """

    scores: Mapping[str, Score]
    notes: Mapping[str, str] = field(default_factory=dict)


class Judge(Protocol):
    """Protocol of judges.

    Attributes:
        metrics: "min" or "max" by metric, which values are better; the first one ranks utterances.
    """

    metrics: Mapping[str, str]

    def load(self) -> None:
        """Loads what the judge needs; called once, before the first speech.

        Raises:
            MissingPackageError: it is not installed; the judge is then left out by name.
        """
        ...

    def __call__(self, speech: Speech) -> Verdict:
        """Rates speech; equal speech gets equal scores."""
        ...
