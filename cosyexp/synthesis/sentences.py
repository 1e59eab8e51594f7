"""Splits a long text into pieces that an llm speaks one at a time."""

import re
from collections.abc import Callable, Iterator, Sequence

# Text tokens: a shorter piece takes in the next sentence, a longer one is split.
SHORT, LONG = 20, 80
# The ends of sentences, clauses, words and characters, with what closes or follows them, and how
# many tokens a piece has before a new one begins there. No full stop inside 3.14 or e.g. ends a
# sentence, as no space follows it.
LEVELS = (
    (re.compile(r"""(?<=[.!?])["'”’)\]]*\s+|(?<=[。！？；…])[”’」』）]*\s*|\n+"""), SHORT),
    (re.compile(r"(?<=[,;:])\s+|(?<=[，、：])\s*"), LONG),
    (re.compile(r"\s+"), LONG),
    (re.compile(r"(?<=.)"), LONG),
)
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|vs|etc|No|[A-Za-z])\.$")


def split_text(text: str, count: Callable[[str], int]) -> list[str]:
    """Splits an English or Chinese text into pieces of a sentence or a few short ones.

    A sentence that is too long for a piece is split after a comma, between words, or else anywhere.
    Joined, the pieces are the text without the white space between them.

    Args:
        text: the text.
        count: returns the number of text tokens of a string.
    """
    return [piece for part in _pieces(text, count, LEVELS) if (piece := part.strip())]


def _pieces(
    text: str, count: Callable[[str], int], levels: Sequence[tuple[re.Pattern[str], int]]
) -> list[str]:
    (end, enough), *finer = levels
    pieces: list[str] = []
    for whole in _split(text, end):
        for part in [whole] if not finer or count(whole) <= LONG else _pieces(whole, count, finer):
            open_piece = pieces and (count(pieces[-1]) < enough or not count(part))
            if open_piece and count(pieces[-1] + part) <= LONG:
                pieces[-1] += part
            else:
                pieces.append(part)
    return pieces


def _split(text: str, end: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in end.finditer(text):
        if not ABBREVIATION.search(text[start : match.end()].rstrip()):
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]
