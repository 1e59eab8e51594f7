"""prepare on real-life recordings: the filter, the report, treated audio, and cuts at pauses."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import yaml

from cosyexp.data.quality import MEASURES, loudness
from cosyexp.data.shards import read_list, read_rows
from tests.support import sentence

WORDS = (
    "corpus=table",
    "corpus.path=all.csv",
    "speech_tokenizer.codes=32",
    "processes=1",
    "max_bad=0.3",
    "out=data",
)
TREATED = ("trim=true", "loudness=-23", "normalize=en")
FILTER = "filter=snr > 15 and clipping < 0.001"
LISTENER = '''
class Listener:
    """Hears the same in each recording."""

    def __init__(self, *, said: str) -> None:
        self.said = self.key = said

    def __call__(self, wave_S, sample_rate):
        return self.said

    def error_rate(self, text, heard):
        return float(text != heard)
'''


@pytest.fixture(scope="module")
def waves(data: Path) -> list[np.ndarray]:
    """Ten utterances of the demo, at 16 kHz."""
    rows = list(read_rows(data / "train/00000.parquet", ["utt", "audio_data"]))[:10]
    decoded = [soundfile.read(io.BytesIO(row["audio_data"]), dtype="float32") for row in rows]
    return [soxr.resample(wave, rate, 16000) for wave, rate in decoded]


def write_corpus(folder: Path, recordings: dict[str, tuple[np.ndarray, str]]) -> None:
    with open(folder / "all.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("utt", "wav", "text", "speaker"))
        for utt, (wave, text) in recordings.items():
            soundfile.write(folder / f"{utt}.wav", wave, 16000)
            writer.writerow((utt, f"{utt}.wav", text, "anna"))


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    shards = [
        shard
        for name in ("train", "valid")
        if (out / f"{name}.list").stat().st_size
        for shard in read_list(f"{out}/{name}.list")
    ]
    return {row["utt"]: row for shard in shards for row in pq.read_table(shard).to_pylist()}


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["utt"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture
def folder(waves: list[np.ndarray], tmp_path: Path) -> Path:
    """A folder with eight good recordings and four that are not."""
    draw = np.random.default_rng(0)
    good = {
        f"good{i}": (np.pad(wave, 8000), f"this is number {i} [laughter]")
        for i, wave in enumerate(waves[:8])
    }
    noisy = waves[8] + 0.1 * draw.standard_normal(len(waves[8]))
    loud = np.clip(8 * waves[9] / np.abs(waves[9]).max(), -1, 1)
    bad = {
        "noisy": (noisy / np.abs(noisy).max(), "noise"),
        "clipped": (loud, "clipped"),
        "cyrillic": (waves[8], "\u043f\u0440\u0438\u0432\u0435\u0442"),
        "double": (waves[9], "This is number 1. [laughter]"),
    }
    write_corpus(tmp_path, good | bad)
    return tmp_path


def test_recordings_are_measured_filtered_treated_and_reported(folder, warm):
    output = warm("prepare", *WORDS, *TREATED, FILTER, cwd=folder).stdout
    out = folder / "data"
    dropped = {utt: row["reason"] for utt, row in table(out / "dropped.tsv").items()}
    assert dropped.keys() == {"noisy", "clipped", "cyrillic"}
    assert dropped["cyrillic"] == "the tokenizer does not know 100% of the text"
    assert dropped["noisy"].startswith("left out by the filter: clipping=0, snr=")
    rows = rows_of(out)
    assert rows.keys() == {*(f"good{i}" for i in range(8)), "double"}
    assert rows["good3"]["text"] == "this is number three [laughter]"
    for utt, row in rows.items():
        wave, rate = soundfile.read(io.BytesIO(row["audio_data"]), dtype="float32")
        assert loudness(wave, rate) == pytest.approx(-23, abs=0.2)
        assert abs(len(row["speech_token"]) - 50 * len(wave) / rate) <= 2
        before = soundfile.info(folder / f"{utt}.wav").duration
        assert utt == "double" or before - 1 <= len(wave) / rate <= before - 0.6
    measured = table(out / "quality.tsv")
    assert len(measured) == 12 and set(MEASURES) < set(measured["noisy"])
    assert float(measured["noisy"]["snr"]) < 15 < float(measured["good0"]["snr"])
    assert float(measured["clipped"]["clipping"]) > 0.01 > float(measured["good0"]["clipping"])
    assert measured["double"]["copies"] == measured["good1"]["copies"] == "1"
    assert measured["good0"]["copies"] == "0" and measured["good0"]["tags"] == "1"
    report = json.loads((out / "report.json").read_text())
    assert report["recordings"] == 12 and report["used"] == 9
    assert report["tags"] == {"[laughter]": 9} and report["measures"]["snr"]["unit"] == "dB"
    assert {row["utt"] for row in report["worst"][:3]} >= {"noisy", "clipped"}
    page = (out / "report.html").read_text()
    assert page.count("<audio") == len(report["worst"]) and "[laughter]" in page
    assert "data/report.html" in output and "9 utterances" in output


def test_a_dry_run_tries_a_filter_and_nothing_is_encoded_again(folder, warm):
    warm("prepare", *WORDS, FILTER, "dry_run=true", cwd=folder)
    out = folder / "data"
    (part,) = out.glob("parts/*.arrow")
    before = part.stat().st_mtime_ns
    assert not list(out.glob("*.list")) and not (out / "meta.yaml").exists()
    assert json.loads((out / "report.json").read_text())["used"] == 9
    warm("prepare", *WORDS, "filter=copies == 0", "dry_run=true", cwd=folder)
    assert part.stat().st_mtime_ns == before
    warm("prepare", *WORDS, "filter=copies == 0 and utt != 'noisy'", cwd=folder)
    assert rows_of(out).keys() == {"clipped", *(f"good{i}" for i in range(8) if i != 1)}
    settings = yaml.safe_load((out / "meta.yaml").read_text())["settings"]
    assert settings["filter"] == "copies == 0 and utt != 'noisy'"
    result = warm("prepare", *WORDS, FILTER, cwd=folder, check=False)
    sentence(result, "data holds a data set of other settings")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["filter=wer < 0.3"], "add it"),
        (["filter=snr >"], "cannot be read"),
        (["filter=open('x') > 3"], "neither a field, a number nor a text"),
        (["segment=vad"], "add transcribe=whisper"),
        (["segment=vad", "segment.shortest=9", "transcribe=whisper"], "at least twice"),
        (["loudness=3"], "loudness=3"),
        (["normalize=xx"], "normalize=xx is not known"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message, folder, warm):
    sentence(warm("prepare", *WORDS, *words, cwd=folder, check=False), message)
    assert not (folder / "data/meta.yaml").exists()


@pytest.fixture
def listener(tmp_path: Path) -> list[str]:
    """Overrides that let a class of one's own transcribe and verify."""
    (tmp_path / "ears.py").write_text(LISTENER)
    for group, said in (("transcribe", "good morning"), ("verify", "good evening")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / f"conf/{group}/mine.yaml").write_text(
            f"_target_: ears.Listener\nsaid: {said}\n"
        )
    return ["--config-dir", "conf", "trusted=[ears]", "transcribe=mine", "verify=mine"]


def test_a_long_recording_is_cut_transcribed_and_verified(waves, listener, warm, tmp_path):
    gap = np.zeros(16000, np.float32)
    joined = np.concatenate([x for wave in waves for x in (wave, gap)])
    write_corpus(tmp_path, {"long": (joined, ""), "short": (waves[0], "good evening")})
    warm("prepare", *WORDS, "segment=vad", "segment.longest=8", *listener, cwd=tmp_path)
    rows = rows_of(tmp_path / "data")
    pieces = {utt: row for utt, row in rows.items() if utt.startswith("long-")}
    assert {row["text"] for row in pieces.values()} == {"good morning"}
    assert rows["short"]["text"] == "good evening"
    seconds = [soundfile.info(io.BytesIO(row["audio_data"])).duration for row in pieces.values()]
    assert all(2 <= second <= 8 for second in seconds)
    assert sum(seconds) == pytest.approx(sum(map(len, waves)) / 16000, rel=0.25)
    measured = table(tmp_path / "data/quality.tsv")
    assert measured["short"]["wer"] == "0" and measured["long-0000"]["wer"] == "1"
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["misheard"][0]["heard"] == "good evening"
