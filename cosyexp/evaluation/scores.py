"""Scores of utterances, and their mean with a bootstrap interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cosyexp.data.draws import keyed

RESAMPLES = 1000
LEVEL = 0.95  # of the interval
# metrics whose logarithms are averaged: the exponential of the mean cross-entropy, and a ratio
GEOMETRIC = ("perplexity", "duration_ratio")


class Score(NamedTuple):
    """What was measured of an utterance.

    Attributes:
        value: the value, which is finite.
        weight: its weight in the mean, such as the number of words of an error rate; > 0.
    """

    value: float
    weight: float = 1.0


class Summary(NamedTuple):
    """The mean of a metric over utterances.

    Attributes:
        mean: the weighted mean.
        low: lower end of the 95 % interval.
        high: upper end of it.
        utterances: number of utterances that it was measured on.
    """

    mean: float
    low: float
    high: float
    utterances: int


def summarize(scores: Sequence[Score], name: str, *key: object) -> Summary:
    """Returns the mean of scores, with an interval by the percentile bootstrap (Efron 1979).

    Utterances are drawn with replacement, 1000 times.

    Args:
        scores: of the utterances, at least one.
        name: of the metric; those in `GEOMETRIC` have the geometric mean.
        key: identifies the random draws.
    """
    values, weights = np.array(scores, dtype=np.float64).T
    if name in GEOMETRIC:
        values = np.log(values)
    sums_U2 = np.stack([values * weights, weights], axis=1)
    drawn = keyed(*key, name).integers(len(scores), size=(RESAMPLES, len(scores)))
    totals_R2 = sums_U2[drawn].sum(axis=1)
    ends = np.quantile(totals_R2[:, 0] / totals_R2[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    found = np.array([np.average(values, weights=weights), *ends])
    mean, low, high = (np.exp(found) if name in GEOMETRIC else found).tolist()
    return Summary(mean, low, high, len(scores))
