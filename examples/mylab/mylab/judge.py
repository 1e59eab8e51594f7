"""A judge: how far the pace of speech is from that of the recording."""

import math

from cosyexp.evaluation.judges.base import Speech, Verdict
from cosyexp.evaluation.scores import Score


class Pace:
    """Absolute logarithm of the ratio of the two durations: 0 for the same pace."""

    metrics = {"pace_error": "min"}

    def load(self) -> None:
        """Loads nothing."""

    def __call__(self, speech: Speech) -> Verdict:
        """Returns the error; nothing for a recording itself."""
        if speech.reference_S is None:
            return Verdict({})
        ratio = len(speech.wave_S) / len(speech.reference_S)
        return Verdict({"pace_error": Score(abs(math.log(ratio)))})
