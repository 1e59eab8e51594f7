"""Scores that rank the answers to a text, and the choice of a preference pair.

To add a score, write a class as those here, and a YAML in `conf/score/`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rapidfuzz.distance import Levenshtein

from cosyexp.registry import register


class Score(Protocol):
    """Protocol of scores: rates an answer; lower is better."""

    def __call__(self, row: Mapping[str, Any], answer: Sequence[int]) -> float:
        """Returns the score of an answer.

        Args:
            row: columns of the utterance by name: text, speech_token, ...
            answer: speech tokens.
        """
        ...


def edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Returns the Levenshtein distance of two sequences, as a share of the longer one."""
    return float(Levenshtein.normalized_distance(a, b))


@register("score")
class EditDistance:
    """Edit distance to the speech tokens of the ground truth, as a share of the longer one."""

    def __call__(self, row: Mapping[str, Any], answer: Sequence[int]) -> float:
        """Returns the distance, in [0, 1]."""
        return edit_distance(row["speech_token"], answer)


def select_pair(
    row: Mapping[str, Any],
    candidates: Sequence[Sequence[int]],
    score: Score | None,
    max_tokens: int,
) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the chosen and the rejected answer: the best and the worst candidate by the score.

    Args:
        row: columns of the utterance by name.
        candidates: the answers; empty ones are ignored.
        score: rates them; None: the ground truth is chosen, and the first candidate that differs
            from it rejected.
        max_tokens: maximum length of an answer; a candidate that reaches it was cut off, and gets
            the worst score.

    Raises:
        ValueError: no pair can be made, with the reason as the message.
    """
    answers = [candidate for candidate in candidates if candidate]
    if not answers:
        raise ValueError("empty")
    if score is None:
        truth: Sequence[int] = row["speech_token"]
        wrong = next((answer for answer in answers if answer != truth), None)
        if wrong is None:
            raise ValueError("equal to the ground truth")
        return truth, wrong
    scores = [score(row, a) if len(a) < max_tokens else math.inf for a in answers]
    ranked = sorted((value, i) for i, value in enumerate(scores))
    if ranked[0][0] == ranked[-1][0]:
        raise ValueError("no candidate better than another")
    return answers[ranked[0][1]], answers[ranked[-1][1]]
