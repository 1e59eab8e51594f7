"""What judges measure, and whether they hear."""

import sys
from itertools import product

import numpy as np
import pytest
import soundfile

from cosyexp.data.shards import read_list, read_rows
from cosyexp.errors import UserError
from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.metrics import edits, error_rate, words


def by_recursion(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        by_recursion(a[1:], b) + 1,
        by_recursion(a, b[1:]) + 1,
        by_recursion(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edits_are_those_of_their_definition():
    draw = np.random.default_rng(0)
    for sizes in product(range(5), range(6)):
        a, b = (draw.integers(3, size=size).tolist() for size in sizes)
        assert edits(a, b) == edits(b, a) == by_recursion(a, b)
    assert edits("kitten", "sitting") == 3


def test_words_of_several_scripts():
    assert words("Don\u2019t, he said: it's 3 o'clock!") == [
        "don't",
        "he",
        "said",
        "it's",
        "3",
        "o'clock",
    ]
    assert (
        words("你好, world") == ["你", "好", "world"]
        and words("Ça été naïve") == ["ça", "été", "naïve"]
        and words(" ... ") == []
    )


def test_an_error_rate_is_a_share_of_what_was_said():
    assert error_rate("The lamp is red.", "the lamp is red") == 0
    assert error_rate("The lamp is red.", "a lamp, is very red") == 0.5
    assert error_rate("The lamp is red.", "") == 1 and error_rate("Yes.", "no no no") == 3
    assert error_rate("...", "") == 0 and error_rate("...", "a b") == 2


def test_a_recogniser_hears_what_was_said(data, tmp_path):
    rows = [
        row
        for shard in read_list(str(data / "valid.list"))
        for row in read_rows(shard, ["utt", "audio_data", "text"])
    ][:3]
    judge, rates, noise = (
        WhisperASR(language="en"),
        [],
        np.random.default_rng(0).standard_normal(32000) * 0.1,
    )
    for row in rows:
        (tmp_path / "speech.wav").write_bytes(row["audio_data"])
        wave, rate = soundfile.read(tmp_path / "speech.wav")
        rates.append(error_rate(row["text"], judge(wave, rate)))
    assert np.mean(rates) < 0.5 < error_rate(rows[0]["text"], judge(noise, 16000))


def test_a_judge_that_is_not_there_is_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is not a Whisper model"):
        WhisperASR(tmp_path)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match=r"cosyexp\[eval\]"):
        WhisperASR()
