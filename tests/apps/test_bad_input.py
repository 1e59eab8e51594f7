"""What is the user's to mend: one sentence that names the thing and the remedy, a non-zero exit, and nothing lost."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cosyexp.data.shards import COLUMNS, read_list, read_rows, write_shard
from cosyexp.run.checkpoint import Checkpoints
from tests.support import MODELS, QUICK, TINY, environment, metrics, sentence, train_words

RUNS = [f"{model}=runs/demo/{model}" for model in MODELS]


def contents(folder: Path) -> dict[str, str]:
    """The files below a folder with their checksums, but for logs and caches, which a start that is refused may write."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".arrow", ".log") and path.name != ".lock"
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refused(warm, tmp_path) -> Callable[..., str]:
    """Runs an app in `tmp_path`, which says one sentence with all `parts`, and changes no file there."""

    def refused(app: str, words: Sequence[str], *parts: str) -> str:
        before = contents(tmp_path)
        result = warm(app, *words, cwd=tmp_path, check=False)
        said = sentence(result, *parts)
        assert result.stderr.strip() == said
        assert contents(tmp_path) == before
        return result.stdout

    return refused


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """Copies of the trained runs, in runs/demo/ of `tmp_path`."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs/demo"


# words --------------------------------------------------------------------------------------------------------------

WORDS = {
    "misspelled option": ("train", ["trainer.stepz=1"], ["trainer.stepz", "Did you mean steps?"]),
    "misspelled section": ("train", ["trianer.steps=1"], ["trianer", "Did you mean trainer?"]),
    "misspelled option of a network": ("train", ["network.widht=1"], ["network.widht", "--cfg job"]),
    "added option": ("train", ["+typo=1"], ["+typo", "--cfg job"]),
    "misspelled group": ("train", ["modle=flow"], ["modle", "Did you mean mode or model?"]),
    "misspelled model": ("train", ["model=flwo"], ["model/flwo", "Available options", "flow hifigan llm"]),
    "misspelled family": ("train", ["family=demmo"], ["family/demmo", "Available options", "demo"]),
    "misspelled format": ("export", ["format=onx"], ["format/onx", "Available options", "jit onnx"]),
    "wrong type": ("train", ["trainer.steps=abc"], ["trainer.steps=abc", "Integer"]),
    "wrong choice": ("train", ["trainer.precision=fp8"], ["trainer.precision=fp8", "[fp32, bf16, fp16]"]),
    "several values": ("train", ["model=llm,flow"], ["model=llm,flow", "--multirun"]),
    "no value": ("train", ["trainer.steps"], ["'trainer.steps'", "EQUAL"]),
    "data without a list": ("train", ["data=parquet"], ["data.train, data.valid must be given", "data.train=..."]),
    "data without a folder": ("train", ["data=prepared"], ["data.dir must be given", "data.dir=..."]),
    "average of nothing": ("average", [], ["run_dir must be given", "run_dir=..."]),
    "average by a misspelled rule": ("average", ["run_dir=x", "select=worst"], ["select=worst", "[best, last]"]),
    "export of nothing": ("export", [], ["there is no run under runs/", "run_dir="]),
    "export in another precision": ("export", ["precision=fp8"], ["fp8", "expected one of"]),
    "nothing to say": ("synthesize", RUNS, ["text must be given", "text=..."]),
    "nobody to say it": ("synthesize", ["text=hello"], ["llm", "flow", "hifigan", "must be given"]),
    "unknown backend": ("synthesize", ["text=hello", *RUNS, "backend=tvm"], ["backend=tvm", "[torch, onnx, jit]"]),
    "corpus without a root": ("prepare", ["corpus=ljspeech"], ["corpus.root must be given"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(case, refused):
    app, words, parts = WORDS[case]
    refused(app, words, *parts)


VALUES = {
    "trainer.accumulate=0": ["accumulate"],
    "trainer.steps=-1": ["steps"],
    "optimizer.lr=-1": ["lr", "-1"],
    "optimizer.lr=abc": ["lr", "abc"],
    "data.max_frames=abc": ["max_frames", "abc"],
    "data.workers=-1": ["workers", "-1"],
    "engine.nproc_per_node=0": ["nproc_per_node", "0"],
    "engine.nproc_per_node=many": ["nproc_per_node", "many"],
    "network.llm.heads=3": ["3 heads"],
    "scheduler=noam_hold": ["steps"],
}


@pytest.mark.parametrize("value", VALUES)
def test_values_that_make_no_sense(value, refused, data):
    words = [value, "trainer.steps=null", "trainer.epochs=1"] if value == "scheduler=noam_hold" else ["trainer.steps=1", value]
    refused("train", train_words("llm", data, *words), *VALUES[value])


# data ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(data) -> list[dict[str, Any]]:
    return [row for shard in read_list(str(data / "train.list")) for row in read_rows(shard, COLUMNS.names)][:12]


@pytest.fixture(scope="module")
def valid(data, tmp_path_factory) -> Path:
    """A small validation set."""
    path = tmp_path_factory.mktemp("valid") / "valid.parquet"
    write_shard(path, list(read_rows(read_list(str(data / "valid.list"))[0], COLUMNS.names))[:4])
    return path


def parquet_words(train: object, valid: object, *words: str) -> list[str]:
    return ["model=llm", "data=parquet", f"data.train={train}", f"data.valid={valid}", *TINY["llm"], *QUICK, "trainer.steps=1", *words]


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
    "another kind of file": (lambda path, rows: path.write_text("utt,text\n"), ["no readable parquet file", "prepare it again"]),
    "no bytes": (lambda path, rows: path.write_bytes(b""), ["no readable parquet file", "prepare it again"]),
    "no rows": (lambda path, rows: write_shard(path, []), ["holds no utterance", "name another list"]),
    "no ids": (without_ids, ["no column 'utt'"]),
    "missing": (lambda path, rows: None, ["there is no data file", "prepare it, or correct its list"]),
}


@pytest.mark.parametrize("case", SHARDS)
def test_unusable_shards(case, refused, rows, valid, tmp_path):
    spoil, parts = SHARDS[case]
    write_shard(tmp_path / "good.parquet", rows)
    spoil(tmp_path / "bad.parquet", rows)
    (tmp_path / "a.list").write_text("good.parquet\nbad.parquet\n")
    words = parquet_words("a.list" if case != "no rows" else "bad.parquet", valid, "data.processes=1")
    refused("train", words, "bad.parquet", *parts)


def test_a_half_written_shard_is_named_by_the_process_that_found_it(warm, rows, valid, tmp_path):
    for name in ("a", "b"):
        half(tmp_path / f"{name}.parquet", rows)
    (tmp_path / "a.list").write_text("a.parquet\nb.parquet\n")
    words = [word for word in parquet_words("a.list", valid) if word != "data.processes=1"]
    result = warm("train", *words, "data.processes=2", cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(result, ".parquet is no readable parquet file")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["there is no data list a.list", "prepare one"]),
        (lambda path: path.write_text("\n"), ["a.list is empty", "one parquet file a line"]),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), ["a.list is no data list", "one parquet path a line"]),
        (lambda path: path.mkdir(), ["a.list is no data list", "one parquet path a line"]),
    ],
    ids=["missing", "empty", "binary", "folder"],
)
def test_unusable_lists(make, parts, refused, valid, tmp_path):
    make(tmp_path / "a.list")
    refused("train", parquet_words("a.list", valid), *parts)


def test_two_ranks_say_it_once(warm, valid, tmp_path):
    result = warm("train", *parquet_words("a.list", valid, "engine.nproc_per_node=2"), cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(result, "there is no data list a.list")
    assert not list(tmp_path.rglob("config.yaml"))


def test_an_empty_validation_set(refused, rows, tmp_path):
    write_shard(tmp_path / "train.parquet", rows)
    write_shard(tmp_path / "valid.parquet", [])
    refused("train", parquet_words("train.parquet", "valid.parquet"), "valid.parquet holds no utterance", "name another list")


def test_utterances_without_tokens_are_left_out_counted_and_named(warm, rows, valid, tmp_path):
    write_shard(tmp_path / "a.parquet", [{**row, "speech_token": []} if i in (2, 5) else row for i, row in enumerate(rows)])
    said = warm("train", *parquet_words("a.parquet", valid, "data.max_bad=0.2", "run_dir=run"), cwd=tmp_path).stdout
    told = f"2 of 12 utterances left out: {rows[2]['utt']}: it has no speech_token; {rows[5]['utt']}: it has no speech_token"
    assert told in said and "10 utterances to train on" in said
    assert told in (tmp_path / "run/logs/rank_0.log").read_text()


def test_more_bad_utterances_than_may_be(warm, rows, valid, tmp_path):
    write_shard(tmp_path / "a.parquet", [{**row, "speech_token": []} if i in (2, 5) else row for i, row in enumerate(rows)])
    result = warm("train", *parquet_words("a.parquet", valid, "run_dir=run"), cwd=tmp_path, check=False)
    sentence(result, "2 of 12 utterances in a.parquet", "data.max_bad=0.05", f"the first is {rows[2]['utt']}: it has no speech_token")
    assert not (tmp_path / "run/config.yaml").exists()


def test_nothing_but_bad_utterances(warm, rows, valid, tmp_path):
    write_shard(tmp_path / "a.parquet", [{**row, "speech_token": None} for row in rows])
    result = warm("train", *parquet_words("a.parquet", valid, "data.max_bad=1", "run_dir=run"), cwd=tmp_path, check=False)
    sentence(result, "a.parquet holds no utterance")


@pytest.mark.parametrize("text", ["[[", "", "a: 1"], ids=["no YAML", "empty", "another"])
def test_prepared_data_with_unreadable_metadata(text, refused, data, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.fields"))
    (tmp_path / "data/meta.yaml").write_text(text)
    refused("train", train_words("llm", Path("data"), "trainer.steps=1"), "data", "meta.yaml")


def test_data_that_were_never_prepared(refused):
    refused(
        "train", train_words("llm", Path("nowhere"), "trainer.steps=1"), "nowhere is no prepared data set", "cosyexp.prepare out=nowhere"
    )


def test_data_of_another_token_rate(refused, data):
    words = train_words("llm", data, "trainer.steps=1", "family.token_rate=25")
    refused("train", words, "holds 50 speech tokens a second", "wants 25", "prepare another folder")


def test_missing_speakers(refused, data):
    """Found out before the run directory is made, which would hold the wrong name for ever."""
    refused("train", train_words("llm", data, "trainer.steps=1", "data.speakers=nowhere.safetensors"), "nowhere.safetensors")


def test_preparing_again_with_other_settings(refused, data, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.fields"))
    refused("prepare", ["out=data", "corpus.minutes=3"], "data holds a data set of other settings", "give another out=")


def test_preparing_where_a_file_is(refused, tmp_path):
    (tmp_path / "data").write_text("a file")
    refused("prepare", ["out=data", "corpus.minutes=0.3"], "data")


def test_a_corpus_that_is_not_there(refused):
    refused("prepare", ["corpus=ljspeech", "corpus.root=nowhere"], "nowhere is not LJSpeech's folder", "corpus.root=")


def test_more_codes_than_there_is_speech_for(refused):
    words = ["corpus.minutes=0.3", "family.speech_vocabulary=4000", "out=data", "processes=1"]
    refused("prepare", words, "the speech tokens cannot be fitted", "take fewer, or more speech")


@pytest.fixture(scope="module")
def recordings(rows, tmp_path_factory) -> Path:
    """A corpus in LJSpeech's layout: 12 utterances, of which one is no audio and one is missing."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "wavs").mkdir()
    for i, row in enumerate(rows):
        (root / f"wavs/{i}.wav").write_bytes(b"no audio" if i == 3 else row["audio_data"])
    (root / "wavs/7.wav").unlink()
    (root / "metadata.csv").write_text("".join(f"{i}|{row['text']}|{row['text']}\n" for i, row in enumerate(rows)))
    return root


def prepare_words(root: Path, *words: str) -> list[str]:
    return ["corpus=ljspeech", f"corpus.root={root}", "family.speech_vocabulary=64", "processes=1", "out=data", *words]


def test_recordings_that_cannot_be_used_are_left_out_and_named(recordings, warm, tmp_path):
    said = warm("prepare", *prepare_words(recordings, "max_bad=0.2"), cwd=tmp_path).stdout
    assert "2 of 12 recordings left out: 3: the audio cannot be decoded" in said and "; 7: " in said and "data: 10 utterances" in said
    assert set(yaml.safe_load((tmp_path / "data/meta.yaml").read_text())["left_out"]) == {"3", "7"}


def test_more_bad_recordings_than_may_be(recordings, refused):
    refused("prepare", prepare_words(recordings), "2 of 12 recordings cannot be used", "max_bad=0.05", "the first is 3: ")


# run directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words", "parts"),
    [
        ("llm", ["optimizer.lr=1"], ["optimizer.lr=0.002, not 1"]),
        ("llm", ["seed=1"], ["seed=0, not 1"]),
        ("flow", [], ["model.name=llm, not flow"]),
    ],
    ids=["learning rate", "seed", "model"],
)
def test_a_run_directory_of_another_config(model, words, parts, refused, runs, data):
    words = train_words(model, data, "trainer.steps=4", "run_dir=runs/demo/llm", *words)
    refused("train", words, "runs/demo/llm was begun with", *parts, "repeat the old value", "another run_dir=")


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_run_directory_that_is_a_file(path, refused, data, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused("train", train_words("llm", data, "trainer.steps=1", f"run_dir={path}"), "file")


def test_two_trainings_in_one_run_directory(warm, data, tmp_path):
    words = train_words("llm", data, "trainer.steps=100000", "trainer.valid_every=0", "checkpoint.every=0", "run_dir=run")
    first = subprocess.Popen(
        [sys.executable, "-m", "cosyexp.train", *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    result = warm("train", *words, cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(result, "another process is training in run", "another run_dir=")
    first.terminate()
    assert (first.wait(60), first.stderr.read()) == (0, "")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, len(metrics(tmp_path / "run")) + 1))


CONTENTS = {"no YAML": b"{{{", "empty": b"", "no text": b"\xff\xfe\x00\x80", "another": b"a: 1\n"}
COMMANDS = {
    "train": lambda data: train_words("llm", data, "trainer.steps=4"),
    "average": lambda data: ["run_dir=runs/demo/llm", "num=1"],
    "export": lambda data: ["run_dir=runs/demo/llm", "format=jit"],
    "synthesize": lambda data: ["text=hello", *RUNS],
}


WHERE = [*(("average", content) for content in CONTENTS), *((app, "another") for app in ("train", "export", "synthesize"))]


@pytest.mark.parametrize(("app", "content"), WHERE)
def test_an_unreadable_config(app, content, refused, runs, data):
    (runs / "llm/config.yaml").write_bytes(CONTENTS[content])
    refused(app, COMMANDS[app](data), "runs/demo/llm")


@pytest.mark.parametrize("app", ["average", "export", "synthesize"])
def test_a_folder_that_is_no_run(app, refused, runs, data):
    (runs / "llm/config.yaml").unlink()
    refused(app, COMMANDS[app](data), "runs/demo/llm is no run directory", "name one that cosyexp.train wrote")


@pytest.mark.parametrize("app", ["average", "export", "synthesize"])
def test_checkpoints_that_were_all_cut_short(app, refused, runs, data):
    for path in runs.glob("llm/checkpoints/*/llm.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    said = refused(app, COMMANDS[app](data), "runs/demo/llm has no checkpoint", "train it further")
    assert said.count("is passed over: llm.safetensors is not what was written") == 3


def test_a_checkpoint_that_was_cut_short_is_not_averaged(warm, runs, tmp_path):
    path = runs / "llm/checkpoints/step_00000004/llm.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    said = warm("average", "run_dir=runs/demo/llm", "num=2", cwd=tmp_path).stdout
    assert "step_00000004 is passed over: llm.safetensors is not what was written" in said
    meta = yaml.safe_load((runs / "llm/averages/best2/meta.yaml").read_text())
    assert [source["step"] for source in meta["sources"]] == [0, 2]


# average, export, synthesize ----------------------------------------------------------------------------------------

ON_RUNS = {
    "too few checkpoints": ("average", ["run_dir=runs/demo/llm", "num=9"], ["has 3 checkpoints", "num=9", "smaller num, or strict=false"]),
    "no checkpoints at all": ("average", ["run_dir=runs/demo/llm", "num=0"], ["num=0", "num=1"]),
    "unknown metric": ("average", ["run_dir=runs/demo/llm", "metric=wer"], ["validation wer", "select=last"]),
    "output is a folder": ("average", ["run_dir=runs/demo/llm", "num=1", "output=runs"], ["runs"]),
    "output below a file": ("average", ["run_dir=runs/demo/llm", "num=1", "output=runs/demo/llm/config.yaml/x"], ["config.yaml"]),
    "unknown component": (
        "export",
        ["run_dir=runs/demo/llm", "components=llm.prefil"],
        ["no component llm.prefil", "it has llm.prefill, llm.decode"],
    ),
    "unknown weights": ("export", ["run_dir=runs/demo/llm", "weights=worst"], ["weights=worst", "best, last, ema, average"]),
    "no average yet": ("export", ["run_dir=runs/demo/llm", "weights=average"], ["no average yet", "cosyexp.average run_dir=runs/demo/llm"]),
    "weights of another model": (
        "export",
        ["run_dir=runs/demo/llm", "weights=runs/demo/flow/checkpoints/step_00000000/flow.safetensors"],
        ["flow.safetensors does not fit", "are missing", "are unknown"],
    ),
    "out is a file": ("export", ["run_dir=runs/demo/llm", "format=jit", "out=runs/demo/llm/config.yaml"], ["config.yaml"]),
    "runs swapped": (
        "synthesize",
        ["text=hello", "llm=runs/demo/flow", "flow=runs/demo/llm", RUNS[2]],
        ["runs/demo/flow is a run of flow", "one of llm as llm="],
    ),
    "no text": ("synthesize", ["text=", *RUNS], ["text=''", "has nothing to say"]),
    "text outside the alphabet": ("synthesize", ["text=你好42", *RUNS], ["你好42", "has nothing to say", "alphabet"]),
    "unknown speaker": ("synthesize", ["text=hello", *RUNS, "speaker=bob"], ["no speaker bob", "anna, ben, carl, dora"]),
    "nothing exported": (
        "synthesize",
        ["text=hello", *RUNS, "backend=onnx"],
        ["llm.prefill.fp32.onnx", "cosyexp.export run_dir=runs/demo/llm"],
    ),
    "wav is a folder": ("synthesize", ["text=hello", *RUNS, "out=runs"], ["runs"]),
    "weights to start from are missing": ("train", ["init_from=nowhere.pt"], ["nowhere.pt"]),
    "weights to start from are another model's": ("train", ["init_from=runs/demo/flow"], ["flow.safetensors does not fit"]),
}


@pytest.mark.parametrize("case", ON_RUNS)
def test_words_about_runs(case, refused, runs, data):
    app, words, parts = ON_RUNS[case]
    refused(app, train_words("llm", data, "run_dir=new", *words) if app == "train" else words, *parts)


def test_a_run_without_speakers(refused, runs):
    (runs / "llm/speakers.safetensors").unlink()
    refused("synthesize", ["text=hello", *RUNS], "keeps no speakers", "data.speakers=")


@pytest.mark.parametrize("name", ["speakers.safetensors", "exports/jit/llm.decode.fp32.zip"])
def test_a_file_of_a_run_that_is_damaged(name, refused, runs, warm, tmp_path):
    if name.startswith("exports"):
        warm("export", "run_dir=runs/demo/llm", "format=jit", cwd=tmp_path)
    (runs / "llm" / name).write_text("nonsense")
    refused("synthesize", ["text=hello", *RUNS, "backend=jit" if "jit" in name else "backend=torch"], name)


def test_a_run_may_not_name_code_of_others(refused, runs):
    config = runs / "llm/config.yaml"
    config.write_text(config.read_text().replace("cosyexp.models.llm.transformer_lm.TransformerLM", "os.system"))
    refused("export", ["run_dir=runs/demo/llm", "format=jit"], "os.system", "may be built")


# a full disk --------------------------------------------------------------------------------------------------------

FULL = "the disk is full"


def test_a_disk_that_is_full_at_any_file_of_a_checkpoint_costs_nothing(trained, data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=4", "run_dir=run")
    at_the_second_checkpoint = [("tensors", 2), ("state", 1), ("files", 4)]
    for where, times in at_the_second_checkpoint:
        result = warm.module("tests.apps.full_disk", where, times, "train", *words, cwd=tmp_path)
        assert result.stderr.strip() == sentence(result, FULL, "free some space and repeat the command")
        newest = Checkpoints(tmp_path / "run/checkpoints").latest()
        assert newest is not None and newest.step == 0
    config = (tmp_path / "run/config.yaml").read_bytes()
    sentence(warm.module("tests.apps.full_disk", "files", 1, "train", *words, cwd=tmp_path), FULL)
    assert (tmp_path / "run/config.yaml").read_bytes() == config
    assert "resuming at step 0" in warm("train", *words, cwd=tmp_path).stdout
    last = "checkpoints/step_00000004/llm.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (trained / "runs/demo/llm" / last).read_bytes()


def test_a_disk_that_is_full_keeps_the_older_average(warm, runs, tmp_path):
    path = runs / "llm/averages/best2/llm.safetensors"
    warm("average", "run_dir=runs/demo/llm", "num=2", cwd=tmp_path)
    before = path.read_bytes()
    for where in ("tensors", "files"):
        result = warm.module("tests.apps.full_disk", where, 1, "average", "run_dir=runs/demo/llm", "num=2", cwd=tmp_path)
        assert result.stderr.strip() == sentence(result, FULL)
        assert path.read_bytes() == before
    warm("average", "run_dir=runs/demo/llm", "num=2", cwd=tmp_path)
    assert path.read_bytes() == before and not list(path.parents[1].glob("*.tmp"))


def test_a_disk_that_is_full_keeps_the_older_sound(warm, runs, tmp_path):
    (tmp_path / "out.wav").write_text("precious")
    result = warm.module("tests.apps.full_disk", "files", 1, "synthesize", "text=hello", *RUNS, cwd=tmp_path)
    assert result.stderr.strip() == sentence(result, FULL)
    assert (tmp_path / "out.wav").read_text() == "precious"


@pytest.mark.parametrize(("where", "times"), [("files", 1), ("files", 3), ("tensors", 1)], ids=["shard", "list", "front end"])
def test_a_disk_that_is_full_leaves_data_unprepared(where, times, warm, tmp_path):
    words = ["corpus.minutes=0.3", "family.speech_vocabulary=64", "processes=1", "out=data"]
    result = warm.module("tests.apps.full_disk", where, times, "prepare", *words, cwd=tmp_path)
    assert result.stderr.strip() == sentence(result, FULL)
    assert not (tmp_path / "data/meta.yaml").exists()
    assert "data: 8 utterances" in warm("prepare", *words, cwd=tmp_path).stdout


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Four megabytes; skips where this process may not mount a file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, so no disk can be filled")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def leave(disk: Path, size: int) -> None:
    """Fills a disk but for some bytes."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - size))


ON_A_SMALL_DISK = {
    "train": (300_000, lambda data: train_words("llm", data, "trainer.steps=4", "checkpoint.keep_best=0", "run_dir=disk/new")),
    "average": (30_000, lambda data: ["run_dir=disk/llm", "num=2"]),
    "export": (30_000, lambda data: ["run_dir=disk/llm", "format=jit"]),
    "synthesize": (8_192, lambda data: ["text=hello", *RUNS, "out=disk/hello.wav"]),
    "prepare": (100_000, lambda data: ["corpus.minutes=0.3", "family.speech_vocabulary=64", "processes=1", "out=disk/data"]),
}


@pytest.mark.parametrize("app", ON_A_SMALL_DISK)
def test_a_disk_that_is_really_full(app, warm, trained, runs, data, small_disk, tmp_path):
    size, words = ON_A_SMALL_DISK[app]
    shutil.copytree(trained / "runs/demo/llm", small_disk / "llm")
    before = contents(small_disk / "llm")
    leave(small_disk, size)
    result = warm(app, *words(data), cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(result, FULL, "free some space and repeat the command")
    assert before.items() <= contents(small_disk / "llm").items()
    if app == "train":
        (small_disk / "filler").unlink()
        last = "checkpoints/step_00000004/llm.safetensors"
        warm(app, *words(data), cwd=tmp_path)
        assert (small_disk / "new" / last).read_bytes() == (trained / "runs/demo/llm" / last).read_bytes()
