"""Preference pairs through the command."""

import pyarrow.parquet as pq
import pytest
import yaml

from cosyexp.data.shards import COLUMNS, read_list
from tests.support import contents, sentence, train_words

LLM, SPOKEN = "run_dir=runs/demo/llm", ["limit=6", "batch_size=4"]


@pytest.fixture
def spoken(runs, warm, data, tmp_path):
    """Runs the app on the prepared data."""

    def spoken(*words, check=True):
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
    said = spoken("out=pairs").stdout.splitlines()[-1]
    assert said.startswith("pairs: 12 pairs, 0 skipped, mean edit distance 0.")
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
    said = warm("train", *words, cwd=tmp_path).stdout
    assert "6 utterances to train on, 6 to validate on" in said and "done at step 1" in said


def test_a_command_that_was_stopped_goes_on(spoken, warm, data, tmp_path):
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
    told = spoken("limit=20", "out=pairs").stdout.splitlines()[-1]
    assert spoken("limit=20", "out=whole").stdout.splitlines()[-1] == told.replace(
        "pairs:", "whole:"
    )
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")
    assert spoken("limit=20", "out=pairs").stdout.splitlines()[-1] == told  # nothing is left to do


def test_pairs_by_what_a_recogniser_hears(spoken, tmp_path):
    words = [
        "score=wer",
        "candidates=2",
        "limit=1",
        "language=en",
        "flow=runs/demo/flow",
        "hifigan=runs/demo/hifigan",
        "out=pairs",
    ]
    said = spoken(*words).stdout.splitlines()[-1]
    assert (
        said.startswith("pairs: ")
        and yaml.safe_load((tmp_path / "pairs/meta.yaml").read_text())["utterances"] == 2
    )
    assert spoken(*words).stdout.splitlines()[-1] == said
    sentence(
        spoken(*words, "flow=other", check=False),
        "pairs was begun with flow=runs/demo/flow, not other",
    )


def test_the_demo_corpus_prepares_itself(runs, warm, tmp_path):
    words = ["data.corpus.minutes=0.5", "limit=2", "candidates=3", "score=edit"]
    warm("prefer", LLM, *words, cwd=tmp_path)
    assert (tmp_path / "data/demo_50hz/meta.yaml").exists() and (
        tmp_path / "data/demo_pairs/meta.yaml"
    ).exists()
    said = warm("prefer", "-m", LLM, "seed=1,2", *words, cwd=tmp_path).stdout
    assert "data/demo_pairs+seed-1:" in said and "data/demo_pairs+seed-2:" in said


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
        (["run_dir=runs/demo/none"], ["is no run directory"]),
        (["candidates=0"], ["candidates=0 makes no sense", "at least 1"]),
        (["limit=0"], ["limit=0 makes no sense"]),
        (["batch_size=-1"], ["batch_size=-1 makes no sense"]),
        (["score=edit"], ["score=edit compares candidates", "candidates=2"]),
        (["score=mos"], ["score", "mos", "none, edit, wer"]),
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
        (["data.dir=nowhere"], ["nowhere is no prepared data set"]),
        (
            ["data=parquet", "data.train=a.list", "data.valid=b.list"],
            ["there is no data list a.list"],
        ),
        (["data=parquet"], ["data.train, data.valid must be given"]),
    ],
)
def test_what_cannot_be_done_is_a_sentence(runs, refused, data, words, parts):
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
        "50 speech tokens a second",
        "wants 25",
    )
