"""How far one sequence is from another."""

import re
from collections.abc import Hashable, Sequence

import numpy as np

# a word is a run of letters and digits, but for the scripts that put no spaces between words: there it is one character
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:'[^\W_]+)*"
)


def edits(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and replacements that make one of the other (Levenshtein 1966)."""
    numbers: dict[Hashable, int] = {}
    first, second = ([numbers.setdefault(x, len(numbers)) for x in sequence] for sequence in (a, b))
    other, places = np.asarray(second, dtype=np.int64), np.arange(len(b) + 1)
    costs = places
    for i, x in enumerate(first):
        kept = np.minimum(costs[1:] + 1, costs[:-1] + (other != x))
        costs = places + np.minimum.accumulate(
            np.concatenate([[i + 1], kept]) - places
        )  # insertions, all at once
    return int(costs[-1])


def words(text: str) -> list[str]:
    """In lower case, without punctuation; Chinese and Japanese by characters."""
    return WORD.findall(text.lower().replace("\u2019", "'"))


def error_rate(said: str, heard: str) -> float:
    """Word errors as a share of the words of the text (character errors, where a script has no spaces)."""
    wanted = words(said)
    return edits(wanted, words(heard)) / max(len(wanted), 1)
