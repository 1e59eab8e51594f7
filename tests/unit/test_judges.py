"""Judges: clean speech is rated best, noise is rated worse, and what is missing is left out."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.evaluate import build_judges
from cosyexp.evaluation.judges import mos, similarity
from cosyexp.evaluation.judges.base import Speech
from cosyexp.evaluation.metrics import character_error_rate, word_error_rate
from tests.support import folder_from
from tests.unit.test_signal import noisy

NODES = {
    "wer": {"_target_": "cosyexp.evaluation.judges.error_rates.ErrorRates", "language": "en"},
    "similarity": {"_target_": "cosyexp.evaluation.judges.similarity.SpeakerSimilarity"},
    "mos": {"_target_": "cosyexp.evaluation.judges.mos.DistillMOS"},
}
RATE = 22050
NOISE = (0, 10, 20, 30)  # dB


@pytest.fixture(scope="module")
def recordings() -> list[tuple[str, np.ndarray]]:
    """Texts and waveforms of four sentences of LJSpeech, less than 30 seconds."""
    folder = folder_from("COSYEXP_SPEECH", "ljspeech-120")
    lines = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    found = [line.split("|") for line in lines]
    return [(text, read(folder / f"wavs/{utt}.wav")) for utt, _, text in found[:4]]


def read(path: Path) -> np.ndarray:
    wave, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE
    return np.asarray(wave)


def joined(recordings: list[tuple[str, np.ndarray]]) -> tuple[str, np.ndarray]:
    texts, waves = zip(*recordings, strict=True)
    return " ".join(texts), np.concatenate(waves)


@pytest.mark.parametrize("name", ["similarity", "mos"])
def test_less_noise_is_rated_better(name, recordings):
    (judge,), _ = build_judges({name: NODES[name]})
    (metric,) = judge.metrics
    text, wave = recordings[0]
    found = [
        judge(Speech(speech, RATE, text, wave)).scores[metric].value
        for speech in (*(noisy(wave, decibels) for decibels in NOISE), wave)
    ]
    assert found == sorted(found) and found[-1] > found[0] + 0.3
    again = judge(Speech(noisy(wave, NOISE[0]), RATE, text, wave)).scores[metric].value
    assert again == found[0]


def test_less_noise_is_understood_better(recordings):
    (judge,), _ = build_judges({"wer": NODES["wer"]})
    text, wave = joined(recordings[1:])
    verdicts = [judge(Speech(noisy(wave, decibels), RATE, text, None)) for decibels in NOISE]
    for metric in ("wer", "cer"):
        found = [verdict.scores[metric].value for verdict in verdicts]
        assert found == sorted(found, reverse=True) and found[0] > found[-1] + 0.1
    assert verdicts[-1].notes["heard"]


def test_recordings_are_understood(recordings):
    """Four sentences in one window of Whisper, whose error rate on LJSpeech is 0.07."""
    text, wave = joined(recordings)
    heard = WhisperASR(language="en")(wave, RATE)
    assert word_error_rate(text, heard) == pytest.approx(0.07, abs=0.05)


def test_a_speaker_is_more_similar_to_herself_than_to_another(recordings):
    (judge,), _ = build_judges({"similarity": NODES["similarity"]})
    folder = folder_from("COSYEXP_SPEECH", "asterisk-200")
    others = sorted(folder.rglob("*.flac"))[:3]
    own, other = [], []
    (_, reference), *rest = recordings
    for (text, wave), path in zip(rest[:3], others, strict=True):
        own.append(judge(Speech(wave, RATE, text, reference)).scores["similarity"].value)
        stranger, rate = soundfile.read(path, dtype="float32")
        speech = Speech(stranger, rate, text, reference)
        other.append(judge(speech).scores["similarity"].value)
    assert min(own) > max(other)


def test_characters_are_counted_in_normalized_words():
    assert character_error_rate("The lamp.", "the  lamp") == 0
    assert character_error_rate("lamp", "lump") == 0.25
    assert character_error_rate("...", "ab") == 2


def test_a_judge_that_is_not_installed_is_left_out_by_name(monkeypatch):
    for module in (mos, similarity):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    judges, left_out = build_judges(NODES)
    assert judges == [] and list(left_out) == list(NODES)
    assert all("pip install" in why for why in left_out.values())
