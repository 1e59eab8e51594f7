"""Bad data get one sentence, or a line that counts and names the utterances left out."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cosyexp.data.shards import COLUMNS, read_list, read_rows, write_shard
from tests.support import QUICK, TINY, sentence, train_words


@pytest.fixture(scope="module")
def rows(data: Path) -> list[dict[str, Any]]:
    return [
        row
        for shard in read_list(str(data / "train.list"))
        for row in read_rows(shard, COLUMNS.names)
    ][:12]


@pytest.fixture(scope="module")
def valid(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small validation set."""
    path = tmp_path_factory.mktemp("valid") / "valid.parquet"
    write_shard(path, list(read_rows(read_list(str(data / "valid.list"))[0], COLUMNS.names))[:4])
    return path


def parquet_words(train: object, valid: object, *words: str) -> list[str]:
    return [
        "model=llm",
        "data=parquet",
        f"data.train={train}",
        f"data.valid={valid}",
        *TINY["llm"],
        *QUICK,
        "trainer.steps=1",
        *words,
    ]


def half(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_shard(path, rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_shard(path, rows)
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(len(content) // 2) + content[100 + len(content) // 2 :])


def without_ids(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_shard(path, rows)
    pq.write_table(pq.read_table(path).drop_columns(["utt"]), path)


SHARDS = {
    "half written": (half, ["half-written?", "prepare it again"]),
    "damaged": (damaged, ["is damaged", "prepare it again"]),
    "another kind of file": (
        lambda path, rows: path.write_text("utt,text\n"),
        ["not a readable parquet file", "prepare it again"],
    ),
    "no bytes": (
        lambda path, rows: path.write_bytes(b""),
        ["not a readable parquet file", "prepare it again"],
    ),
    "no rows": (
        lambda path, rows: write_shard(path, []),
        ["has no usable utterance", "name another list"],
    ),
    "no ids": (without_ids, ["no column 'utt'"]),
    "missing": (
        lambda path, rows: None,
        ["there is no data file", "prepare it, or correct its list"],
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_unusable_shards(case, refused, rows, valid, tmp_path):
    spoil, parts = SHARDS[case]
    write_shard(tmp_path / "good.parquet", rows)
    spoil(tmp_path / "bad.parquet", rows)
    (tmp_path / "a.list").write_text("good.parquet\nbad.parquet\n")
    words = parquet_words(
        "a.list" if case != "no rows" else "bad.parquet", valid, "data.processes=1"
    )
    refused("train", words, "bad.parquet", *parts)


def test_a_half_written_shard_is_named_by_the_process_that_found_it(warm, rows, valid, tmp_path):
    for name in ("a", "b"):
        half(tmp_path / f"{name}.parquet", rows)
    (tmp_path / "a.list").write_text("a.parquet\nb.parquet\n")
    words = [word for word in parquet_words("a.list", valid) if word != "data.processes=1"]
    result = warm("train", *words, "data.processes=2", cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(result, ".parquet is not a readable parquet file")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["there is no data list a.list", "prepare one"]),
        (lambda path: path.write_text("\n"), ["a.list is empty", "one parquet path per line"]),
        (
            lambda path: path.write_bytes(b"\xff\xfe\x00"),
            ["a.list is not a data list", "one parquet path per line"],
        ),
        (lambda path: path.mkdir(), ["a.list is not a data list", "one parquet path per line"]),
    ],
    ids=["missing", "empty", "binary", "folder"],
)
def test_unusable_lists(make, parts, refused, valid, tmp_path):
    make(tmp_path / "a.list")
    refused("train", parquet_words("a.list", valid), *parts)


def test_two_ranks_print_one_sentence(warm, valid, tmp_path):
    result = warm(
        "train",
        *parquet_words("a.list", valid, "engine.nproc_per_node=2"),
        cwd=tmp_path,
        check=False,
    )
    assert result.stderr.strip() == sentence(result, "there is no data list a.list")
    assert not list(tmp_path.rglob("config.yaml"))


def test_an_empty_validation_set(refused, rows, tmp_path):
    write_shard(tmp_path / "train.parquet", rows)
    write_shard(tmp_path / "valid.parquet", [])
    refused(
        "train",
        parquet_words("train.parquet", "valid.parquet"),
        "valid.parquet has no usable utterance",
        "name another list",
    )


def test_utterances_without_tokens_are_left_out_counted_and_named(warm, rows, valid, tmp_path):
    write_shard(
        tmp_path / "a.parquet",
        [{**row, "speech_token": []} if i in (2, 5) else row for i, row in enumerate(rows)],
    )
    output = warm(
        "train", *parquet_words("a.parquet", valid, "data.max_bad=0.2", "run_dir=run"), cwd=tmp_path
    ).stdout
    reasons = "; ".join(f"{rows[i]['utt']}: it has no speech_token" for i in (2, 5))
    message = f"a.parquet: 2 of 12 utterances left out: {reasons}"
    assert message in output and "10 training utterances" in output
    assert message in (tmp_path / "run/logs/rank_0.log").read_text()


def test_more_bad_utterances_than_tolerated(warm, rows, valid, tmp_path):
    write_shard(
        tmp_path / "a.parquet",
        [{**row, "speech_token": []} if i in (2, 5) else row for i, row in enumerate(rows)],
    )
    result = warm(
        "train", *parquet_words("a.parquet", valid, "run_dir=run"), cwd=tmp_path, check=False
    )
    sentence(
        result,
        "2 of 12 utterances in a.parquet",
        "data.max_bad=0.05",
        f"the first is {rows[2]['utt']}: it has no speech_token",
    )
    assert not (tmp_path / "run/config.yaml").exists()


def test_nothing_but_bad_utterances(warm, rows, valid, tmp_path):
    write_shard(tmp_path / "a.parquet", [{**row, "speech_token": None} for row in rows])
    result = warm(
        "train",
        *parquet_words("a.parquet", valid, "data.max_bad=1", "run_dir=run"),
        cwd=tmp_path,
        check=False,
    )
    sentence(result, "a.parquet has no usable utterance")


@pytest.mark.parametrize("text", ["[[", "", "a: 1"], ids=["no YAML", "empty", "another"])
def test_prepared_data_with_unreadable_metadata(text, refused, data, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.fields"))
    (tmp_path / "data/meta.yaml").write_text(text)
    refused("train", train_words("llm", Path("data"), "trainer.steps=1"), "data", "meta.yaml")


def test_data_that_were_never_prepared(refused):
    refused(
        "train",
        train_words("llm", Path("nowhere"), "trainer.steps=1"),
        "nowhere is not a prepared data set",
        "cosyexp.prepare out=nowhere",
    )


def test_data_of_another_token_rate(refused, data):
    words = train_words("llm", data, "trainer.steps=1", "family.token_rate=25")
    refused(
        "train", words, "holds 50 speech tokens per second", "needs 25", "prepare another folder"
    )


def test_missing_speakers(refused, data):
    """This is noticed before the run directory is made, which would keep the wrong name."""
    refused(
        "train",
        train_words("llm", data, "trainer.steps=1", "data.speakers=nowhere.safetensors"),
        "nowhere.safetensors",
    )


def test_preparing_again_with_other_settings(refused, data, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.fields"))
    refused(
        "prepare",
        ["out=data", "corpus.minutes=3"],
        "data holds a data set of other settings",
        "give another out=",
    )


def test_preparing_where_a_file_is(refused, tmp_path):
    (tmp_path / "data").write_text("a file")
    refused("prepare", ["out=data", "corpus.minutes=0.3"], "data")


def test_a_corpus_that_is_not_there(refused):
    refused(
        "prepare",
        ["corpus=ljspeech", "corpus.root=nowhere"],
        "there is no file or folder nowhere",
        "corpus.root=",
    )


def test_more_codes_than_the_speech_allows(refused):
    words = [
        "corpus.minutes=0.3",
        "speech_tokenizer.codes=4000",
        "family.speech_vocabulary=4000",
        "out=data",
        "processes=1",
    ]
    refused("prepare", words, "the speech tokens cannot be fitted", "take fewer, or more speech")


@pytest.fixture(scope="module")
def recordings(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in LJSpeech's layout: 12 utterances, one not audio, one missing."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "wavs").mkdir()
    for i, row in enumerate(rows):
        (root / f"wavs/{i}.wav").write_bytes(b"no audio" if i == 3 else row["audio_data"])
    (root / "wavs/7.wav").unlink()
    (root / "metadata.csv").write_text(
        "".join(f"{i}|{row['text']}|{row['text']}\n" for i, row in enumerate(rows))
    )
    return root


def prepare_words(root: Path, *words: str) -> list[str]:
    return [
        "corpus=ljspeech",
        f"corpus.root={root}",
        "family.speech_vocabulary=64",
        "processes=1",
        "out=data",
        *words,
    ]


def test_recordings_that_cannot_be_used_are_left_out_and_named(recordings, warm, tmp_path):
    output = warm("prepare", *prepare_words(recordings, "max_bad=0.2"), cwd=tmp_path).stdout
    assert (
        "2 of 12 recordings left out: 3: the audio cannot be decoded" in output
        and "; 7: " in output
        and "data: 10 utterances" in output
    )
    assert sum(yaml.safe_load((tmp_path / "data/meta.yaml").read_text())["left_out"].values()) == 2
