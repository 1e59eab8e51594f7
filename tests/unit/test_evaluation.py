"""Error rates of recognized text, and the speech recognizer."""

import sys
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import soundfile

from cosyexp.data.shards import read_list, read_rows
from cosyexp.errors import UserError
from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.metrics import word_error_rate, words
from cosyexp.preferences.scores import edit_distance


def edits(a: Sequence[object], b: Sequence[object]) -> int:
    """Returns the Levenshtein distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        edits(a[1:], b) + 1,
        edits(a, b[1:]) + 1,
        edits(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_rates_are_shares_of_the_edits_of_the_definition():
    draw = np.random.default_rng(0)
    for sizes in product(range(5), range(6)):
        a, b = (draw.integers(3, size=size).tolist() for size in sizes)
        wanted = edits(a, b)
        assert edit_distance(a, b) == pytest.approx(wanted / max(len(a), len(b), 1))
        reference, hypothesis = (" ".join(map(str, side)) for side in (a, b))
        found = word_error_rate(reference, hypothesis)
        assert found == pytest.approx(wanted / max(len(a), 1))


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
    assert words("it's你好'a") == ["it's", "你", "好", "a"]


def test_an_error_rate_is_a_share_of_the_words_of_the_reference():
    assert word_error_rate("The lamp is red.", "the lamp is red") == 0
    assert word_error_rate("The lamp is red.", "a lamp, is very red") == 0.5
    assert word_error_rate("The lamp is red.", "") == 1 and word_error_rate("Yes.", "no no no") == 3
    assert word_error_rate("...", "") == 0 and word_error_rate("...", "a b") == 2


def test_a_recognizer_understands_speech_and_not_noise(data, tmp_path):
    rows = [
        row
        for shard in read_list(str(data / "valid.list"))
        for row in read_rows(shard, ["utt", "audio_data", "text"])
    ][:3]
    recognize, rates = WhisperASR(language="en"), []
    noise = np.random.default_rng(0).standard_normal(32000) * 0.1
    for row in rows:
        (tmp_path / "speech.wav").write_bytes(row["audio_data"])
        wave, rate = soundfile.read(tmp_path / "speech.wav")
        rates.append(word_error_rate(row["text"], recognize(wave, rate)))
    assert np.mean(rates) < 0.5 < word_error_rate(rows[0]["text"], recognize(noise, 16000))


def test_a_missing_recognizer_is_reported_in_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is not a Whisper model in CTranslate2's format"):
        WhisperASR(tmp_path)
    with pytest.raises(
        UserError, match=r"language=klingon is not known to .*: give a code such as"
    ):
        WhisperASR(language="klingon")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r"ctranslate2 is not installed: .*cosyexp\[eval\]"):
        WhisperASR()
