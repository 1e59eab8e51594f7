"""Measures of recordings, the filter's language, cuts at pauses, texts, and treated audio."""

import math
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st

from cosyexp.data import quality
from cosyexp.data.corpora.base import Recording
from cosyexp.data.filtering import Filter
from cosyexp.data.population import Population, Rules
from cosyexp.data.quality import TAG, measure
from cosyexp.data.segmentation import TICK, PauseSegmenter
from cosyexp.data.tokenizers import CharacterTokenizer
from cosyexp.data.treatment import Sound, Treatment, in_words
from cosyexp.errors import UserError

RATE = 24000


def voice(f0: float = 120.0, seconds: float = 4.0, rate: int = RATE) -> np.ndarray:
    """A harmonic tone with a pause of a quarter of a second in each second, (S,) float32."""
    time = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * math.pi * n * f0 * time) / n for n in range(1, 20))
    return (0.2 * tone * (time % 1 < 0.75)).astype(np.float32)


def measures(wave: np.ndarray, rate: int = RATE) -> dict[str, float]:
    return measure(wave[:, None], rate, soxr.resample(wave, rate, 16000))


def noise(size: int, power: float) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(size) * math.sqrt(power)).astype(np.float32)


# measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_loudness_is_that_of_the_standard(rate):
    """ITU-R BS.1770-4: a sine of 997 Hz at full scale in one channel has -3.01 LUFS."""
    sine = np.sin(2 * math.pi * 997 * np.arange(3 * rate) / rate).astype(np.float32)
    assert quality.loudness(sine, rate) == pytest.approx(-3.01, abs=0.06)
    assert quality.loudness(0.1 * sine, rate) == pytest.approx(-23.01, abs=0.06)
    quiet = np.concatenate([sine, 1e-3 * sine, np.zeros(rate, np.float32)])
    assert quality.loudness(quiet, rate) == pytest.approx(-3.01, abs=0.5), "pauses do not count"


@pytest.mark.parametrize("decibels", [20, 10, 5])
def test_snr_is_that_of_planted_noise(decibels):
    clean = voice(rate=16000)
    power = float(np.mean(clean**2)) * 10 ** (-decibels / 10)
    noisy = measures(clean + noise(len(clean), power), 16000)
    assert noisy["snr"] == pytest.approx(decibels, abs=1)
    assert measures(clean, 16000)["snr"] > 40


def test_faults_of_the_recording_are_measured():
    speech = voice()
    assert measures(speech)["clipping"] < 1e-3
    clipped = np.clip(4 * speech / np.abs(speech).max(), -1, 1)
    share = float(np.mean(np.abs(clipped) == 1))
    assert measures(clipped)["clipping"] == pytest.approx(share, rel=0.1)
    assert measures(0.3 * clipped)["clipping"] == pytest.approx(share, rel=0.1), "at any level"
    assert measures(speech + 0.05)["dc"] == pytest.approx(0.05 + speech.mean(), abs=1e-4)
    white = noise(len(speech), 0.01)
    narrow = soxr.resample(soxr.resample(white, RATE, 16000), 16000, RATE)
    assert measures(white)["bandwidth"] > 11900 and 7500 < measures(narrow)["bandwidth"] < 8300
    assert measures(speech)["silence"] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("f0", [80, 130, 220, 400])
def test_f0_is_that_of_the_voice(f0):
    found = measures(voice(f0))
    for name in ("f0", "f0_low", "f0_high"):
        assert found[name] == pytest.approx(f0, rel=0.03)
    assert "f0" not in measures(noise(RATE, 0.01)), "noise has none"


def test_the_shortest_recordings_can_be_measured():
    assert set(measures(voice(seconds=0.2))) >= {"snr", "loudness", "bandwidth"}


# the filter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", True),
        ("snr > 15", True),
        ("snr > 15 and wer < 0.3", False),
        ("15 < snr <= 20.5", True),
        ("not (snr < 30 or cps >= 2e1)", False),
        ("loudness > -30", True),
        ("speaker == 'anna' and 'lamp' in text", True),
        ("speaker != 'anna'", False),
        ("f0 > 60", False),
        ("not f0 > 60", True),
    ],
)
def test_a_filter_compares_fields(text, kept):
    row = {"snr": 20.5, "wer": 0.5, "cps": 12, "loudness": -23, "f0": None, "speaker": "anna"}
    assert Filter(text)({**row, "text": "where is the lamp?"}) is kept


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("snrr > 3", "there is no field snrr"),
        ("snr", "snr is not a comparison"),
        ("snr > 'a'", "compares a number with a text"),
        ("speaker > 3", "compares a number with a text"),
        ("snr in 'abc'", "compares a number with a text"),
        ("snr + 1 > 3", "neither a field, a number nor a text"),
        ("snr.real > 3", "neither a field, a number nor a text"),
        ("abs(dc) > 3", "neither a field, a number nor a text"),
        ("__import__('os').system('true')", "is not a comparison"),
        ("[x for x in ()]", "is not a comparison"),
        ("snr > 3 if 1 else 2", "is not a comparison"),
        ("snr is 3", "another comparison"),
        ("snr >", "invalid syntax"),
        ("(" * 900, "cannot be read"),
        ("not " * 50 + "x > 3", "there is no field x"),
        ("snr > 1 and " * 1000, "longer than 1000 characters"),
        ("snr > True", "True and False are not numbers"),
    ],
)
def test_anything_else_is_refused(text, reason):
    with pytest.raises(UserError, match="filter=") as refused:
        Filter(text)
    assert reason in str(refused.value)


@given(st.text(alphabet="snrwe <>=!()'\"andot0.[]\\\0:\n,-", max_size=60))
def test_no_text_ends_in_another_error(text):
    try:
        kept = Filter(text)({"snr": 3.0})
    except UserError:
        return
    assert kept in (True, False)


# pieces of long recordings ------------------------------------------------------------------------


def speech(*seconds: float) -> np.ndarray:
    """Probabilities of chunks: speech and pauses of these lengths in turn."""
    levels = [(0.9, 0.1)[i % 2] for i in range(len(seconds))]
    return np.concatenate(
        [np.full(round(s / TICK), level) for s, level in zip(seconds, levels, strict=True)]
    )


def lengths(spans: list[tuple[float, float]]) -> list[float]:
    return [round(end - start, 1) for start, end in spans]


def test_pauses_are_cut_and_padding_is_kept():
    (a, b), (c, d) = PauseSegmenter().spans(speech(5, 1, 6))
    assert (a, b, c, d) == pytest.approx((0, 5.1, 5.9, 12), abs=0.07)
    assert lengths(PauseSegmenter().spans(speech(5, 0.4, 6))) == [11.4], "too short a pause"
    assert lengths(PauseSegmenter().spans(speech(5, 0.9, 1, 0.6, 6))) == [5.1, 7.7], "joined"
    assert lengths(PauseSegmenter().spans(speech(8, 0.2, 5, 0.3, 6))) == [13.3, 6.1], "too long"
    assert PauseSegmenter().spans(speech(0, 9)) == [] == PauseSegmenter().spans(np.empty(0))


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=30), st.floats(0.0, 0.3))
def test_pieces_are_in_order_within_limits_and_hold_all_speech(seconds, padding):
    probability = speech(*seconds)
    spans = PauseSegmenter(padding=padding).spans(probability)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and all(end - start <= 15.01 for start, end in spans)
    assert not edges or (edges[0] >= 0 and edges[-1] <= len(probability) * TICK)
    inside = np.zeros(len(probability), bool)
    for start, end in spans:
        inside[math.floor(start / TICK) : math.ceil(end / TICK)] = True
    edges_of_speech = np.flatnonzero(np.diff(np.concatenate([[0], probability > 0.5, [0]])))
    for start, stop in edges_of_speech.reshape(-1, 2):
        assert stop - start < 3 or inside[start:stop].all()


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="at least twice"):
        PauseSegmenter(shortest=3, longest=5)


# texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("Dr.  Smith paid $3.50.", "en", "doctor Smith paid three point five dollars."),
        ('say "hi" to 3 men', "en", 'say "hi" to three men'),
        ("[laughter] 5 <strong>km</strong>", "en", "[laughter] five <strong>km</strong>"),
        ("我有10块钱", "zh", "我有十块钱"),
        ("我有10块钱", "auto", "我有十块钱"),
    ],
)
def test_numbers_and_abbreviations_become_words(text, language, words):
    assert in_words(text, language) == words


def test_texts_and_languages_that_cannot_be_normalized():
    with pytest.raises(ValueError, match="cannot be normalized as en"):
        in_words("the #1 man", "en")
    with pytest.raises(UserError, match="normalize=xx is not known"):
        in_words("one", "xx")


def test_composed_and_decomposed_names_are_the_same():
    fields: dict[str, Any] = {"text": "caf\u00e9", "path": "a.wav"}
    one = Recording(utt="\u00e9", speaker="Jos\u00e9", **fields)
    two = Recording(utt="e\u0301", speaker="Jose\u0301", **{**fields, "text": "cafe\u0301"})
    assert one == two


def test_tags_and_brackets_are_found():
    text = "a [breath] <b>c</b> (aside) {x} \uff08\u7b11\uff09 d < 3"
    assert TAG.findall(text) == ["[breath]", "<b>", "</b>", "(aside)", "{x}", "\uff08\u7b11\uff09"]


def test_unknown_characters_are_a_fault_above_a_share():
    tokenizer = CharacterTokenizer(alphabet=" abcdefghijklmnopqrstuvwxyz")
    rules = Rules(unknown=tokenizer.unknown, max_unknown=0.5)
    shares = {text: rules.unknown_share(text) for text in ("A b", "a 1", "\u0430\u0431", "")}
    assert shares == {"A b": 0, "a 1": 0.5, "\u0430\u0431": 1, "": 0}
    assert not rules.fault({"unknown": 0.5}) and "60%" in rules.fault({"unknown": 0.6})
    assert Rules(max_unknown=1).fault({"unknown": 1.0}), "nothing is left to say"


# what recordings have in common -------------------------------------------------------------------


def test_doubled_and_leaking_texts_and_strange_voices_are_measured():
    draw = np.random.default_rng(0)
    rows = [
        {"text": text, "speaker": "a", "embedding": draw.standard_normal(16) + 4 * (i == 5)}
        for i, text in enumerate(["Hello, there!", "hello there", *map(str, range(30))])
    ]
    population = Population()
    for i, row in enumerate(rows):
        population.add(row, held_out=i == 1)
    found = [population.measures(row, i == 1) for i, row in enumerate(rows)]
    assert [m["copies"] for m in found[:3]] == [1, 1, 0]
    assert [m["leak"] for m in found[:3]] == [1, 0, 0]
    distances = np.array([m["speaker_distance"] for m in found], float)
    assert distances.argmax() == 5 and distances[5] > 2 > distances[6]
    assert np.mean(np.square(distances)) == pytest.approx(1, rel=1e-3)


# treated audio ------------------------------------------------------------------------------------


def test_silence_is_trimmed_and_the_loudness_set():
    rate, edge = 16000, np.zeros(8000, np.float32)
    wave = np.concatenate([edge, voice(rate=rate, seconds=2.75), edge])
    sound = Sound(wave, None, np.stack([wave, wave], 1), rate)
    treated = Treatment(trim=True, loudness=-23.0).sound(sound)
    assert len(treated.speech_S) / rate == pytest.approx(2.75 + 0.2, abs=0.05)
    assert quality.loudness(treated.samples_SC.mean(1), rate) == pytest.approx(-23, abs=0.1)
    assert treated.samples_SC.shape[1] == 2 and treated.audio and treated.audio[:4] == b"fLaC"
    assert Treatment().sound(sound) is sound
    loud = Treatment(loudness=0.0).sound(sound)
    assert np.abs(loud.samples_SC).max() == pytest.approx(1), "not above full scale"
