"""On a full disk: one sentence, nothing is lost, and the command resumes when there is space."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosyexp.run.checkpoint import Checkpoints
from tests.disks import NO_DISK, leave, small_disk
from tests.support import RUNS, contents, sentence, train_words

FULL = "the disk is full"


def test_a_disk_that_is_full_at_any_file_of_a_checkpoint_loses_nothing(
    trained, data, warm, tmp_path
):
    words = train_words("llm", data, "trainer.steps=4", "run_dir=run")
    at_the_second_checkpoint = [("tensors", 5), ("state", 1), ("files", 5)]
    for where, times in at_the_second_checkpoint:
        result = warm.module("tests.apps.full_disk", where, times, "train", *words, cwd=tmp_path)
        assert result.stderr.strip() == sentence(
            result, FULL, "free some space and repeat the command"
        )
        newest = Checkpoints(tmp_path / "run").latest()
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
        result = warm.module(
            "tests.apps.full_disk",
            where,
            1,
            "average",
            "run_dir=runs/demo/llm",
            "num=2",
            cwd=tmp_path,
        )
        assert result.stderr.strip() == sentence(result, FULL)
        assert path.read_bytes() == before
    warm("average", "run_dir=runs/demo/llm", "num=2", cwd=tmp_path)
    assert path.read_bytes() == before and not list(path.parents[1].glob("*.tmp"))


def test_a_disk_that_is_full_keeps_the_older_wav(warm, runs, tmp_path):
    (tmp_path / "out.wav").write_text("precious")
    result = warm.module(
        "tests.apps.full_disk", "files", 1, "synthesize", "text=hello", *RUNS, cwd=tmp_path
    )
    assert result.stderr.strip() == sentence(result, FULL)
    assert (tmp_path / "out.wav").read_text() == "precious"


@pytest.mark.parametrize(
    ("where", "times"),
    [("files", 1), ("files", 3), ("tensors", 1)],
    ids=["shard", "list", "front end"],
)
def test_a_disk_that_is_full_leaves_data_unprepared(where, times, warm, tmp_path):
    words = ["corpus.minutes=0.3", "family.speech_vocabulary=64", "processes=1", "out=data"]
    result = warm.module("tests.apps.full_disk", where, times, "prepare", *words, cwd=tmp_path)
    assert result.stderr.strip() == sentence(result, FULL)
    assert not (tmp_path / "data/meta.yaml").exists()
    assert "data: 8 utterances" in warm("prepare", *words, cwd=tmp_path).stdout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Four megabytes; skips where this process may not mount a file system."""
    with small_disk(tmp_path / "disk", 4) as mounted:
        if not mounted:
            pytest.skip(NO_DISK)
        yield tmp_path / "disk"


ON_A_SMALL_DISK = {
    "train": (
        300_000,
        lambda data: train_words(
            "llm", data, "trainer.steps=4", "checkpoint.keep_best=0", "run_dir=disk/new"
        ),
    ),
    "average": (30_000, lambda data: ["run_dir=disk/llm", "num=2"]),
    "export": (30_000, lambda data: ["run_dir=disk/llm", "format=jit", "latency=false"]),
    "synthesize": (8_192, lambda data: ["text=hello", *RUNS, "out=disk/hello.wav"]),
    "prepare": (
        100_000,
        lambda data: [
            "corpus.minutes=0.3",
            "family.speech_vocabulary=64",
            "processes=1",
            "out=disk/data",
        ],
    ),
}


@pytest.mark.parametrize("app", ON_A_SMALL_DISK)
def test_a_disk_that_is_really_full(app, warm, trained, runs, data, disk, tmp_path):
    size, words = ON_A_SMALL_DISK[app]
    shutil.copytree(trained / "runs/demo/llm", disk / "llm")
    before = contents(disk / "llm")
    leave(disk, size)
    result = warm(app, *words(data), cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(result, FULL, "free some space and repeat the command")
    assert before.items() <= contents(disk / "llm").items()
    if app == "train":
        (disk / "filler").unlink()
        last = "checkpoints/step_00000004/llm.safetensors"
        warm(app, *words(data), cwd=tmp_path)
        assert (disk / "new" / last).read_bytes() == (trained / "runs/demo/llm" / last).read_bytes()
