"""Error rates of recognized text."""

import re

import jiwer

# Chinese and Japanese have no spaces between words, so each character counts as a word.
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:'[^\W_{CJK}]+)*")


def words(text: str) -> list[str]:
    """Returns the words of a text, in lower case and without punctuation.

    In scripts without spaces, each character is a word.
    """
    return WORD.findall(text.lower().replace("\u2019", "'"))


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Returns word errors as a share of the reference's words, by jiwer.

    For Chinese and Japanese this is the character error rate.
    """
    wanted, found = words(reference), words(hypothesis)
    if not wanted:
        return float(len(found))
    return float(jiwer.wer(" ".join(wanted), " ".join(found)))


def character_error_rate(reference: str, hypothesis: str) -> float:
    """Returns character errors as a share of the reference's characters, by jiwer.

    Words are normalized as by `words`, with one space between two.
    """
    wanted, found = " ".join(words(reference)), " ".join(words(hypothesis))
    return float(jiwer.cer(wanted, found)) if wanted else float(len(found))
