"""Which of the answers to a text is better."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosyexp.evaluation.metrics import edits

# how bad an answer is, from the row of its utterance and its speech tokens
Score = Callable[[Mapping[str, Any], Sequence[int]], float]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Insertions, deletions and replacements that make one of the other, as a share of the longer one."""
    return edits(a, b) / max(len(a), len(b), 1)


def edit(row: Mapping[str, Any], answer: Sequence[int]) -> float:
    return edit_distance(row["speech_token"], answer)


def pair(
    row: Mapping[str, Any],
    candidates: Sequence[Sequence[int]],
    score: Score | None,
    max_tokens: int,
) -> tuple[Sequence[int], Sequence[int]]:
    """The chosen and the rejected answer: the best and the worst candidate; without a score, the truth and what is not the truth.

    max_tokens: a candidate of so many tokens did not end by itself, and none is worse. ValueError where the candidates make no pair.
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
    ranked = sorted(
        (score(row, candidate) if len(candidate) < max_tokens else math.inf, i)
        for i, candidate in enumerate(spoken)
    )
    if ranked[0][0] == ranked[-1][0]:
        raise ValueError("no candidate better than another")
    return spoken[ranked[0][1]], spoken[ranked[-1][1]]
