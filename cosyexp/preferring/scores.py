"""Which of the answers to a text is better."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# how bad an answer is, from the row of its utterance and its speech tokens; the error rate of recognised speech would be another
Score = Callable[[Mapping[str, Any], Sequence[int]], float]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """The fewest insertions, deletions and replacements that make one of the other, as a share of the longer one."""
    if not a or not b:
        return float(bool(a or b))
    other, places = np.asarray(b), np.arange(len(b) + 1)
    costs = places
    for i, token in enumerate(a):
        kept = np.minimum(costs[1:] + 1, costs[:-1] + (other != token))
        costs = places + np.minimum.accumulate(np.concatenate([[i + 1], kept]) - places)  # insertions, all at once
    return float(costs[-1]) / max(len(a), len(b))


def edit(row: Mapping[str, Any], answer: Sequence[int]) -> float:
    return edit_distance(row["speech_token"], answer)


SCORES: Mapping[str, Score | None] = {"none": None, "edit": edit}


def pair(row: Mapping[str, Any], candidates: Sequence[Sequence[int]], score: Score | None) -> tuple[Sequence[int], Sequence[int]]:
    """The chosen and the rejected answer: the best and the worst candidate; without a score, the truth and what is not the truth.

    ValueError where the candidates make no pair.
    """
    spoken = [candidate for candidate in candidates if candidate]
    if not spoken:
        raise ValueError("empty")
    if score is None:
        truth: Sequence[int] = row["speech_token"]
        wrong = next((candidate for candidate in spoken if candidate != truth), None)
        if wrong is None:
            raise ValueError("equal to the ground truth")
        return truth, wrong
    ranked = sorted((score(row, candidate), i) for i, candidate in enumerate(spoken))
    if ranked[0][0] == ranked[-1][0]:
        raise ValueError("no candidate better than another")
    return spoken[ranked[0][1]], spoken[ranked[-1][1]]
