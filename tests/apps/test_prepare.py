"""prepare: bad files, corpora in other layouts, ONNX front ends, kills."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import yaml

from cosyexp.data import preparation
from cosyexp.data.corpora.table import Table
from cosyexp.data.frontends.base import Wanted
from cosyexp.data.frontends.kmeans import KMeansTokenizer
from cosyexp.data.frontends.onnx import OnnxSpeaker, OnnxTokenizer
from cosyexp.data.preparation import PrepareOptions
from cosyexp.data.shards import read_list, read_rows
from cosyexp.data.workers import Workers
from cosyexp.errors import UserError
from tests.apps.warm import Warm
from tests.onnx_models import speaker_encoder, tokenizer
from tests.support import contents, environment, sentence

WORDS = ("speech_tokenizer.codes=32", "fit_on=20", "processes=1")


def encoded(wave: np.ndarray, rate: int = 16000, form: str = "WAV", **kwargs: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, **kwargs)
    return file.getvalue()


@pytest.fixture(scope="module")
def waves(data: Path) -> list[np.ndarray]:
    """Eight utterances of the demo, at 16 kHz."""
    rows = list(read_rows(data / "train/00000.parquet", ["utt", "audio_data"]))[:8]
    decoded = [soundfile.read(io.BytesIO(row["audio_data"]), dtype="float32") for row in rows]
    return [soxr.resample(wave, rate, 16000) for wave, rate in decoded]


def write_table(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> None:
    with open(path, "w", encoding=encoding, errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(
            file,
            ["utt", "wav", "text", "speaker"],
            delimiter="," if path.suffix == ".csv" else "\t",
        )
        writer.writeheader()
        writer.writerows(rows)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    shards = [
        shard
        for split in ("train", "valid")
        if (out / f"{split}.list").stat().st_size
        for shard in read_list(f"{out}/{split}.list")
    ]
    return {row["utt"]: row for shard in shards for row in pq.read_table(shard).to_pylist()}


@pytest.fixture(scope="module")
def hostile(
    waves: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A folder with a table of 20 utterances that cannot be used, and why, among 8 that can."""
    folder = tmp_path_factory.mktemp("hostile")
    wave = waves[0]
    flac, wav = encoded(wave, form="FLAC"), encoded(wave)
    lying = bytearray(wav)
    lying[40:44] = (10 * len(wav)).to_bytes(4, "little")
    bad: dict[str, tuple[bytes | None, dict[str, str], str]] = {
        "zero_bytes": (b"", {}, "cannot be decoded"),
        "cut_flac": (flac[: len(flac) // 2], {}, "the audio"),
        "cut_ogg": (encoded(wave, form="OGG")[:300], {}, "the audio"),
        "telephone": (encoded(soxr.resample(wave, 16000, 8000), 8000), {}, "8000 Hz, below 16000"),
        "long": (
            encoded(np.tile(wave, 1 + 45 * 16000 // len(wave))[: 45 * 16000], form="FLAC"),
            {},
            "45.0 s is longer than 30 s",
        ),
        "click": (encoded(wave[8000:9000]), {}, "0.06 s is shorter than 0.2 s"),
        "nan": (
            encoded(np.where(np.arange(len(wave)) == 99, np.nan, wave), subtype="FLOAT"),
            {},
            "samples that are not finite",
        ),
        "infinite": (
            encoded(np.where(np.arange(len(wave)) == 99, np.inf, wave), subtype="FLOAT"),
            {},
            "samples that are not finite",
        ),
        "silent": (encoded(np.zeros(32000)), {}, "empty or silent"),
        "whisper": (
            encoded(wave * 1e-4 / np.abs(wave).max(), subtype="FLOAT"),
            {},
            "is silent (its peak is at -80 dB)",
        ),
        "no_samples": (encoded(wave[:0]), {}, "empty or silent"),
        "lying": (bytes(lying), {}, "cut short"),
        "prose": (b"this is no sound at all\n" * 100, {}, "cannot be decoded"),
        "missing": (None, {}, "cannot be read (No such file or directory)"),
        "folder": (None, {"wav": "."}, "is not a regular file"),
        "unnamed": (None, {"wav": ""}, "has no audio file"),
        "mute": (wav, {"text": "  "}, "it has no text"),
        "latin": (
            wav,
            {"text": b"caf\xe9".decode("utf-8", "surrogateescape")},
            "the text is not UTF-8",
        ),
        "nobody": (wav, {"speaker": ""}, "it has no speaker"),
        "again": (wav, {"utt": "good 0"}, "its id occurs twice"),
    }
    good: dict[str, bytes] = {
        "good 0": encoded(waves[1]),
        "with spaces in its name": encoded(waves[2]),
        "stereo": encoded(
            np.stack([soxr.resample(waves[3], 16000, 96000)] * 2, 1), 96000, subtype="PCM_24"
        ),
        "flac": encoded(waves[4], form="FLAC"),
        "ogg": encoded(waves[5], form="OGG"),
        "mp3": encoded(waves[6], form="MP3"),
        "emoji": encoded(waves[7]),
        "whole": wav,
    }
    rows = []
    for utt, content in good.items():
        (folder / f"{utt}.wav").write_bytes(content)
        rows.append(
            {
                "utt": utt,
                "wav": f"{utt}.wav",
                "text": "hello 😀" if utt == "emoji" else "hello there",
                "speaker": "anna",
            }
        )
    for utt, (audio, row, _) in bad.items():
        if audio is not None:
            (folder / f"{utt}.wav").write_bytes(audio)
        rows.append(
            {"utt": utt, "wav": f"{utt}.wav", "text": "hello there", "speaker": "anna", **row}
        )
    write_table(folder / "all.tsv", rows)
    return folder, {row.get("utt", utt): reason for utt, (_, row, reason) in bad.items()}


@pytest.fixture(scope="module")
def prepared(
    hostile: tuple[Path, dict[str, str]], warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("prepared")
    words = (
        "corpus=table",
        f"corpus.path={hostile[0]}/all.tsv",
        *WORDS,
        "shard_size=3",
        "max_bad=0.9",
        "cache=mel,f0",
        "out=data",
    )
    return folder / "data", warm("prepare", *words, cwd=folder).stdout


def test_every_bad_recording_is_named_and_the_rest_prepared(hostile, prepared):
    reasons, (out, output) = hostile[1], prepared
    dropped = dict(
        line.split("\t")[:2] for line in (out / "dropped.tsv").read_text().splitlines()[1:]
    )
    assert len(reasons) == 20 and dropped.keys() == reasons.keys()
    assert {utt: reason for utt, reason in dropped.items() if reasons[utt] not in reason} == {}
    rows = rows_of(out)
    assert set(rows) == {
        "good 0",
        "with spaces in its name",
        "stereo",
        "flac",
        "ogg",
        "mp3",
        "emoji",
        "whole",
    }
    for row in rows.values():
        seconds = soundfile.info(io.BytesIO(row["audio_data"])).duration
        assert abs(len(row["speech_token"]) - 50 * seconds) <= 2
    assert (
        "20 of 28 recordings left out: " in output and "; and 10 more in data/dropped.tsv" in output
    )
    assert "data: 8 utterances" in output and "'😀' in 1 texts" in output


def test_the_report_has_histograms_and_there_are_cached_fields(prepared):
    out, _ = prepared
    assert (out / "report.html").read_text().count("<svg") > 10
    for shard in read_list(f"{out}/train.list"):
        caches = [path.name.split("-")[0] for path in shard.with_suffix(".fields").glob("*.arrow")]
        assert sorted(caches) == ["f0", "mel"]
    assert not (out / "parts").exists() and not (out / "preparing.yaml").exists()


def test_inspect_describes_a_list(prepared, warm):
    out, _ = prepared
    output = warm("prepare", f"inspect={out}/train.list", cwd=out).stdout
    for part in (
        "7 utterances in 3 shards, 1 speakers",
        "per second; ",
        "audio_data binary",
        "example    good 0: 'hello there'",
    ):
        assert part in output
    sentence(
        warm("prepare", "inspect=nothing.list", cwd=out, check=False),
        "there is no data list nothing.list",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "utt\twav\tspeaker\n",
            "no column that is known to hold the text, but 'utt', 'wav'",
        ),
        (
            "a.csv",
            "who,wav,what\n",
            r"to hold the text, but .* corpus\.columns\.text=, or .*delimiter=",
        ),
        ("a.csv", "", "no column that is known to hold the audio, but nothing"),
        ("a.txt", "utt wav text speaker\n", r"no separator of columns .* corpus\.delimiter="),
        (None, "", r"there is no file .*a\.csv: .* corpus\.path="),
    ],
)
def test_unusable_tables(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_text(content)
    table = Table(name="t", path=str(tmp_path / (name or "a.csv")))
    with pytest.raises(UserError, match=message):
        list(table.recordings())


def test_the_causes_are_named_if_no_recording_can_be_used(waves, warm, tmp_path):
    files = {"a.wav": encoded(soxr.resample(waves[0], 16000, 8000), 8000), "b.m4a": b"ftypM4A"}
    (tmp_path / "lj/wavs").mkdir(parents=True)
    for name, content in {**files, "c.wav": encoded(waves[1]), "d.wav": files["a.wav"]}.items():
        (tmp_path / "lj/wavs" / name).write_bytes(content)
    (tmp_path / "lj/metadata.csv").write_text("a|one\nb|two\nc|\nd|four\ne|five\n")
    words = ("corpus=auto", "corpus.root=~/lj", "out=~/data", *WORDS)
    result = warm("prepare", *words, cwd=tmp_path, check=False, env={"HOME": str(tmp_path)})
    sentence(
        result,
        "none of the first 5 recordings can be used: 2 x a: the audio has 8000 Hz",
        "1 x b: the audio cannot be decoded",
        "1 x c: it has no text",
        "1 x e: the audio file cannot be read (No such file or directory)",
        "data/dropped.tsv names all",
    )
    assert result.stdout.startswith(
        f"~/lj: a table {tmp_path}/lj/metadata.csv ('|' between columns"
    )
    dropped = (tmp_path / "data/dropped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in dropped] == ["utt", "a", "b", "c", "d", "e"]


def test_an_unknown_field(refused):
    refused(
        "prepare",
        ["cache=mel,pitch", *WORDS, "out=data"],
        "cache=pitch is not a field: choose of mel, f0, wave",
    )


def test_a_table_without_rows(refused, tmp_path):
    (tmp_path / "a.csv").write_text("utt,wav,text,speaker\n")
    refused(
        "prepare",
        ["corpus=table", "corpus.path=a.csv", *WORDS, "out=data"],
        "the corpus holds no recording",
    )


@pytest.fixture(scope="module")
def spoken(waves: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoken")
    for i, wave in enumerate(waves):
        (folder / f"{i}.wav").write_bytes(encoded(wave))
    return folder


def test_a_table_has_a_bom_columns_of_other_names_and_no_ids(spoken, warm, tmp_path):
    lines = "".join(f'{spoken}/{i}.wav,"hello, {i}"\n' for i in range(8))
    (tmp_path / "a.csv").write_text("file,said\n" + lines, encoding="utf-8-sig")
    columns = ("audio=file", "text=said", "utt=null", "speaker=null")
    words = (
        "corpus=table",
        "corpus.path=a.csv",
        *(f"corpus.columns.{column}" for column in columns),
        *WORDS,
        "out=data",
    )
    assert "8 utterances" in warm("prepare", *words, cwd=tmp_path).stdout
    rows = rows_of(tmp_path / "data")
    assert {row["text"] for row in rows.values()} == {f"hello, {i}" for i in range(8)}
    assert set(rows) == set("01234567") and {row["spk"] for row in rows.values()} == {"table"}


def test_json_lines(spoken, warm, tmp_path):
    common = {"text": "hello", "speaker": "s", "how": "gently"}
    lines = [json.dumps({"utt": f"u{i}", "wav": f"{spoken}/{i}.wav", **common}) for i in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{cut"]))
    words = (
        "corpus=table",
        "corpus.path=a.jsonl",
        "corpus.columns.instruct=how",
        *WORDS,
        "max_bad=0.2",
        "out=data",
    )
    assert (
        "1 of 8 recordings left out: line 8: line 8 of a.jsonl: it is not a JSON object"
        in warm("prepare", *words, cwd=tmp_path).stdout
    )
    assert {row["instruct"] for row in rows_of(tmp_path / "data").values()} == {"gently"}


@pytest.fixture
def kaldi(spoken: Path, tmp_path: Path) -> Path:
    root = tmp_path / "kaldi"
    root.mkdir()
    (root / "wav.scp").write_text("".join(f"u{i} {spoken}/{i}.wav\n" for i in range(8)))
    (root / "text").write_text("".join(f"u{i} number {i}, please\n" for i in range(7)))
    (root / "utt2spk").write_text("".join(f"u{i} s{i % 2}\n" for i in range(8)))
    (root / "instruct").write_text("u3 Speak slowly.<|endofprompt|>\n")
    return root


def test_kaldi_s_layout(kaldi, warm, tmp_path):
    output = warm(
        "prepare",
        "corpus=kaldi",
        "corpus.root=kaldi",
        *WORDS,
        "max_bad=0.2",
        "out=data",
        cwd=tmp_path,
    ).stdout
    assert (
        "left out: u7: kaldi/text has no line for it" in output
        and "7 utterances" in output
        and "2 speakers" in output
    )
    rows = rows_of(tmp_path / "data")
    assert rows["u3"]["text"] == "number 3, please" and rows["u3"]["spk"] == "s1"
    assert {utt: row.get("instruct") for utt, row in rows.items() if row.get("instruct")} == {
        "u3": "Speak slowly.<|endofprompt|>"
    }
    assert "instruct string" in warm("prepare", "inspect=data", cwd=tmp_path).stdout


def test_a_folder_without_wav_scp(kaldi, refused):
    (kaldi / "wav.scp").unlink()
    words = ["corpus=kaldi", "corpus.root=kaldi", *WORDS, "out=data"]
    refused("prepare", words, "there is no file kaldi/wav.scp", "corpus.root=")


def test_libritts_layout(spoken, warm, refused, tmp_path):
    for i in range(8):
        subset, speaker = ("dev-clean", "9") if i == 7 else ("train-clean-100", str(i % 2))
        folder = tmp_path / "tts" / subset / speaker / "1"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(spoken / f"{i}.wav", folder / f"{speaker}_1_{i}.wav")
        (folder / f"{speaker}_1_{i}.normalized.txt").write_text(f"Text {i}.\n")
    refused(
        "prepare",
        ["corpus=libritts", "corpus.root=tts", "corpus.train=[gone]", *WORDS],
        "tts has no folder gone",
        "corpus.train=",
    )
    output = warm(
        "prepare", "corpus=libritts", "corpus.root=tts", *WORDS, "out=data", cwd=tmp_path
    ).stdout
    assert "8 utterances" in output and "3 speakers" in output
    (held_out,) = read_rows(tmp_path / "data/valid/00000.parquet", ["utt", "text", "spk"])
    assert held_out == {"utt": "9_1_7", "text": "Text 7.", "spk": "9"}


# trained front ends -------------------------------------------------------------------------------


def onnx_words(folder: Path, tokenizer: str, speaker: str, *words: str) -> list[str]:
    kinds = (
        "speech_tokenizer=onnx",
        f"speech_tokenizer.path={tokenizer}",
        "speaker_encoder=onnx",
        f"speaker_encoder.path={speaker}",
    )
    return [
        "corpus=table",
        f"corpus.path={folder}/all.tsv",
        *kinds,
        "family.speech_vocabulary=4096",
        "processes=1",
        "max_bad=0.9",
        *words,
    ]


def test_onnx_front_ends_one_by_one_and_in_batches(hostile, warm, tmp_path):
    speaker = speaker_encoder(tmp_path / "campplus.onnx")
    found = []
    for batch in (1, "B"):
        words = onnx_words(
            hostile[0],
            tokenizer(tmp_path / f"{batch}.onnx", 2, batch),
            speaker,
            "max_seconds=60",
            f"out={batch}",
        )
        warm("prepare", *words, cwd=tmp_path)
        assert "45.0 s is longer than 30 s" in (tmp_path / f"{batch}/dropped.tsv").read_text(), (
            "the tokenizers take no more"
        )
        found.append(rows_of(tmp_path / str(batch)))
    one, many = found
    assert one.keys() == many.keys() and len(one) == 8
    for utt, row in one.items():
        assert (
            abs(
                len(row["speech_token"])
                - 50 * soundfile.info(io.BytesIO(row["audio_data"])).duration
            )
            <= 1
        )
        assert (
            row["speech_token"] == many[utt]["speech_token"] and len(set(row["speech_token"])) > 5
        )
        assert (
            len(row["utt_embedding"]) == 192 and row["utt_embedding"] == many[utt]["utt_embedding"]
        )
    assert not list((tmp_path / "1").glob("*_*.safetensors"))


def test_wrong_onnx_files_are_refused_in_a_sentence(hostile, refused, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    good, speaker = tokenizer(folder / "v1.onnx", 2), speaker_encoder(folder / "campplus.onnx")
    (folder / "prose.onnx").write_text("no model")
    wanted = Wanted(token_rate=50, codes=4096, speaker_dim=192)
    for recipe, path, message in (
        (OnnxTokenizer, speaker, r"campplus\.onnx takes bank .* speech_tokenizer\.path="),
        (OnnxSpeaker, good, r"v1\.onnx takes mel .* speaker_encoder\.path="),
        (
            OnnxTokenizer,
            tokenizer(folder / "v2.onnx", 4),
            r"v2\.onnx gives 25 tokens per second, but the family needs 50",
        ),
        (
            OnnxSpeaker,
            speaker_encoder(folder / "e.onnx", 256),
            r"e\.onnx gives speaker embeddings of 256 numbers, but the family needs 192",
        ),
        (OnnxTokenizer, f"{folder}/prose.onnx", r"prose\.onnx cannot be opened as an ONNX model"),
        (OnnxTokenizer, f"{folder}/gone.onnx", r"there is no file .*gone\.onnx"),
    ):
        with pytest.raises(UserError, match=message):
            recipe(path=path).fit([], wanted)
    with pytest.raises(UserError, match="the family has 9 tokens"):
        OnnxTokenizer(path=good).fit([], replace(wanted, codes=9))
    refused(
        "prepare", onnx_words(hostile[0], speaker, good, "out=data"), "campplus.onnx takes bank"
    )


# resuming -----------------------------------------------------------------------------------------


def test_a_killed_preparation_resumes_to_the_same_bits(spoken, warm, tmp_path):
    rows = [
        {
            "utt": f"u{i}",
            "wav": f"{spoken}/{i % 8}.wav",
            "text": f"text {i}",
            "speaker": f"s{i % 3}",
        }
        for i in range(200)
    ]
    write_table(tmp_path / "a.csv", rows)
    words = (
        "corpus=table",
        "corpus.path=a.csv",
        "speech_tokenizer.codes=32",
        "fit_on=16",
        "shard_size=40",
    )
    warm("prepare", *words, "processes=1", "out=whole", cwd=tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-m", "cosyexp.prepare", *words, "out=killed"],
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not list(tmp_path.glob("killed/parts/*.arrow")):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first, *others = sorted(tmp_path.glob("killed/parts/*.arrow"))
    assert len(others) < 3 and not (tmp_path / "killed/meta.yaml").exists()
    (tmp_path / "killed/parts/000003.arrow").write_bytes(
        first.read_bytes()[:9000]
    )  # as a crash may leave it
    warm("prepare", *words, "out=killed", cwd=tmp_path)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_finished_work_is_not_repeated(spoken, monkeypatch, tmp_path):
    source = Table(name="t", path=str(tmp_path / "a.csv"))
    write_table(
        tmp_path / "a.csv",
        [
            {"utt": f"u{i}", "wav": f"{spoken}/{i}.wav", "text": "hello", "speaker": "s"}
            for i in range(6)
        ],
    )
    options = PrepareOptions(token_rate=50, codes=16, speaker_dim=8, processes=1)
    made: list[np.ndarray] = []

    def encode(self: object, wave: np.ndarray) -> list[int]:
        made.append(wave)
        return [1, 2, 3]

    monkeypatch.setattr(KMeansTokenizer, "encode", encode)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="no more"):
        broken.setattr(preparation, "write", raises)
        preparation.prepare(source, tmp_path / "data", options, {})
    assert len(made) == 6
    preparation.prepare(source, tmp_path / "data", options, {})
    assert len(made) == 6


def test_ctrl_c_is_one_sentence_and_keeps_what_is_done(spoken, said, monkeypatch, tmp_path):
    rows = [
        {"utt": f"u{i}", "wav": f"{spoken}/{i % 8}.wav", "text": f"text {i}", "speaker": "s"}
        for i in range(70)
    ]
    write_table(tmp_path / "a.csv", rows)
    source, made = Table(name="t", path=str(tmp_path / "a.csv")), []
    options = PrepareOptions(token_rate=50, codes=16, speaker_dim=8, fit_on=4, processes=1)

    def encode(self: object, wave: np.ndarray) -> list[int]:
        made.append(wave)
        if len(made) == 66:
            raise KeyboardInterrupt
        return [1, 2, 3]

    monkeypatch.setattr(KMeansTokenizer, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(source, tmp_path / "data", options, {})
    assert said.messages[-1] == "interrupted: the same command goes on where this one stopped"
    meta = preparation.prepare(source, tmp_path / "data", options, {})
    assert len(made) == 66 + 6 and meta["utterances"] == 70
    assert "6 of 6 encoded" in said.text  # 64 were there: they do not count as speed


def blocked(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_is_for_the_parent_alone():
    with Workers(2) as workers:
        assert list(workers.map(blocked, [0])) == [True]
    assert not blocked(0)


def raises(job: object) -> NoReturn:
    raise OSError("no more")


def test_more_bad_recordings_than_tolerated_lose_no_work(hostile, warm, tmp_path):
    words = ("corpus=table", f"corpus.path={hostile[0]}/all.tsv", *WORDS, "out=data")
    result = warm("prepare", *words, cwd=tmp_path, check=False)
    sentence(
        result, "20 of 28 recordings cannot be used", "max_bad=0.05", "data/dropped.tsv names all"
    )
    before = (tmp_path / "data/parts/000000.arrow").stat().st_mtime_ns
    assert not (tmp_path / "data/meta.yaml").exists()
    sentence(
        warm("prepare", *words, "seed=7", cwd=tmp_path, check=False),
        "data holds the beginning of a data set of other settings",
    )
    assert (tmp_path / "data/parts/000000.arrow").stat().st_mtime_ns == before
    assert "8 utterances" in warm("prepare", *words, "max_bad=1", cwd=tmp_path).stdout
    assert yaml.safe_load((tmp_path / "data/meta.yaml").read_text())["utterances"] == 8
