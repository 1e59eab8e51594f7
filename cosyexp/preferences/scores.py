"""Which of the answers to a text is better. To add a score, write a class like these and a YAML in
`conf/score/`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rapidfuzz.distance import Levenshtein

from cosyexp.registry import register


class Score(Protocol):
    """Rates an answer; lower is better."""

    def __call__(self, row: Mapping[str, Any], answer: Sequence[int]) -> float:
        """Returns how bad an answer is.

        Args:
            row: the utterance, by columns: text, speech_token, ...
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
        """Returns a number in [0, 1]."""
        return edit_distance(row["speech_token"], answer)


def select_pair(
    row: Mapping[str, Any],
    candidates: Sequence[Sequence[int]],
    score: Score | None,
    max_tokens: int,
) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the chosen and the rejected answer: the best and the worst candidate by the score.

    Args:
        score: None: the ground truth is chosen, the first candidate unlike it rejected.
        max_tokens: a candidate of so many tokens did not end by itself, and is the worst.

    Raises:
        ValueError: the candidates make no pair.
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
