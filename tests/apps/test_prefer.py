"""Preference pairs, by the command."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cosyexp.data.shards import COLUMNS, read_list
from tests.apps.warm import Warm
from tests.support import contents, sentence, train_words

LLM, SPOKEN = "run_dir=runs/demo/llm", ["limit=6", "batch_size=4"]


@pytest.fixture
def spoken(
    runs: Path, warm: Warm, data: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the app on the prepared data."""

    def spoken(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return warm(
            "prefer",
            LLM,
            "data=prepared",
            f"data.dir={data}",
            *SPOKEN,
            *words,
            cwd=tmp_path,
            check=check,
        )

    return spoken


def test_pairs_of_a_trained_run_train(spoken, warm, tmp_path):
    output = spoken("out=pairs").stdout.splitlines()[-1]
    assert output.startswith("pairs: 12 pairs, 0 skipped, mean edit distance 0.")
    for name in ("train", "valid"):
        (shard,) = read_list(str(tmp_path / f"pairs/{name}.list"))
        table = pq.read_table(shard)
        assert table.column_names == [*COLUMNS.names, "reject_speech_token"] and table.num_rows == 6
        assert all(
            set(tokens) <= set(range(512)) for tokens in table["reject_speech_token"].to_pylist()
        )
    words = train_words(
        "llm",
        tmp_path / "pairs",
        "mode=dpo",
        "init_from=runs/demo/llm",
        "trainer.steps=1",
        "run_dir=dpo",
    )
    output = warm("train", *words, cwd=tmp_path).stdout
    assert "6 training utterances" in output and "6 validation utterances" in output
    assert "done at step 1" in output


def test_a_stopped_command_resumes(spoken, warm, data, tmp_path):
    words = [LLM, "data=prepared", f"data.dir={data}", "limit=20", "out=pairs"]
    stopped = warm.module(
        "tests.apps.full_disk", "files", 3, "prefer", *words, cwd=tmp_path
    )  # begun.yaml, a shard, half a shard
    sentence(stopped, "the disk is full")
    assert [path.name for path in (tmp_path / "pairs/train").iterdir()] == ["00000.parquet"]
    sentence(
        spoken("limit=20", "seed=3", "out=pairs", check=False),
        "pairs was begun with seed=0, not 3",
        "another out=",
    )
    message = spoken("limit=20", "out=pairs").stdout.splitlines()[-1]
    assert spoken("limit=20", "out=whole").stdout.splitlines()[-1] == message.replace(
        "pairs:", "whole:"
    )
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")
    assert (
        spoken("limit=20", "out=pairs").stdout.splitlines()[-1] == message
    )  # nothing is left to do


def test_pairs_by_the_word_error_rate_of_a_recognizer(spoken, tmp_path):
    words = [
        "score=wer",
        "candidates=2",
        "limit=1",
        "language=en",
        "flow=runs/demo/flow",
        "hifigan=runs/demo/hifigan",
        "out=pairs",
    ]
    output = spoken(*words).stdout.splitlines()[-1]
    assert (
        output.startswith("pairs: ")
        and yaml.safe_load((tmp_path / "pairs/meta.yaml").read_text())["utterances"] == 2
    )
    assert spoken(*words).stdout.splitlines()[-1] == output
    sentence(
        spoken(*words, "flow=other", check=False),
        "pairs was begun with score.flow=runs/demo/flow, not other",
    )


def test_the_demo_corpus_prepares_itself(runs, warm, tmp_path):
    words = ["data.corpus.minutes=0.5", "limit=2", "candidates=3", "score=edit"]
    warm("prefer", LLM, *words, cwd=tmp_path)
    assert (tmp_path / "data/demo_50hz/meta.yaml").exists() and (
        tmp_path / "data/demo_pairs/meta.yaml"
    ).exists()
    output = warm("prefer", "-m", LLM, "seed=1,2", *words, cwd=tmp_path).stdout
    assert "data/demo_pairs+seed-1:" in output and "data/demo_pairs+seed-2:" in output


def test_lists_of_parquet_files(runs, warm, data, tmp_path):
    shards = [
        f"data.{name}={read_list(str(data / f'{name}.list'))[0]}" for name in ("train", "valid")
    ]
    warm("prefer", LLM, "data=parquet", *shards, *SPOKEN, "out=pairs", cwd=tmp_path)
    assert (tmp_path / "pairs/speakers.safetensors").read_bytes() == (
        runs / "llm/speakers.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["run_dir=runs/demo/flow"], ["is a run of flow", "run_dir="]),
        (["run_dir=runs/demo/none"], ["is not a run directory"]),
        (["candidates=0"], ["candidates=0 must be >= 1"]),
        (["limit=0"], ["limit=0 must be >= 1"]),
        (["batch_size=-1"], ["batch_size=-1 must be >= 1"]),
        (["score=edit"], ["score= ranks candidates", "candidates=2"]),
        (["score=mos"], ["score/mos", "edit none wer"]),
        (
            ["score=wer", "candidates=2", "flow=runs/demo/flow"],
            ["give flow=<run> and hifigan=<run>"],
        ),
        (
            ["score=wer", "candidates=2", "flow=runs/demo/flow", "hifigan=runs/demo/llm"],
            ["is a run of llm", "hifigan="],
        ),
        (
            [
                "score=wer",
                "candidates=2",
                "flow=runs/demo/flow",
                "hifigan=runs/demo/hifigan",
                "asr=runs",
            ],
            ["is not a Whisper model"],
        ),
        (["weights=average"], ["has no average yet"]),
        (["data.dir=nowhere"], ["nowhere is not a prepared data set"]),
        (
            ["data=parquet", "data.train=a.list", "data.valid=b.list"],
            ["there is no data list a.list"],
        ),
        (["data=parquet"], ["data.train, data.valid must be given"]),
    ],
)
def test_refused_settings(runs, refused, data, words, parts):
    base = [] if "data=parquet" in words else ["data=prepared", f"data.dir={data}"]
    refused("prefer", [LLM, *base, "out=pairs", *words], *parts)


def test_a_run_must_be_named(refused):
    refused("prefer", [], "run_dir must be given")


def test_data_of_another_token_rate(runs, refused, data):
    path = runs / "llm/config.yaml"
    path.write_text(path.read_text().replace("token_rate: 50", "token_rate: 25"))
    refused(
        "prefer",
        [LLM, "data=prepared", f"data.dir={data}"],
        "50 speech tokens per second",
        "needs 25",
    )
