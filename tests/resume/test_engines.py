"""Under every engine a stopped and restarted run ends like an uninterrupted one, bit by bit."""

import shutil
import signal
from pathlib import Path

import pytest

from cosyexp.config import EngineConfig
from cosyexp.training.launch import launch
from tests.resume.checks import hashes, newest
from tests.resume.restarts import restarts
from tests.support import config, metrics, sentence, train_words

EVERY = [
    "trainer.valid_every=3",
    "checkpoint.every=3",
    "trainer.ema=0.9",
    "trainer.running_sum=true",
    "engine.nproc_per_node=2",
]
RUNS = {
    "ddp-hifigan": ["engine=ddp"],
    "fsdp-flow": ["engine=fsdp"],
    **{f"zero{stage}-hifigan": ["engine=deepspeed", f"engine.stage={stage}"] for stage in (2, 3)},
}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two ranks: straight/<name>, stopped/<name>, and across.

    All are trained in the same two processes, as starting them takes long.
    """
    folder, runs = tmp_path_factory.mktemp("engines"), []
    for name, settings in RUNS.items():
        for kind, steps in (("straight", 6), ("stopped", 3), ("stopped", 6)):
            words = [*EVERY, *settings, f"trainer.steps={steps}", f"run_dir={folder}/{kind}/{name}"]
            runs.append(config(name.split("-")[1], data, *words))
    for engine, steps in (("fsdp", 2), ("ddp", 4), ("fsdp", 6)):
        words = [*EVERY, f"engine={engine}", f"trainer.steps={steps}", f"run_dir={folder}/across"]
        runs.append(config("flow", data, *words))
    launch(restarts, runs, EngineConfig(nproc_per_node=2, timeout=300))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_stopped_and_started_again(folder, name):
    stopped, straight = folder / "stopped" / name, folder / "straight" / name
    assert hashes(stopped, 6) == hashes(straight, 6) and len(hashes(straight, 6)) >= 3
    assert metrics(stopped) == metrics(straight)


def test_a_run_of_fsdp_continues_under_ddp_and_back(folder):
    one, other = metrics(folder / "across")[-1], metrics(folder / "straight/fsdp-flow")[-1]
    assert one["step"] == other["step"] == 6
    assert one["valid/loss"] == pytest.approx(other["valid/loss"], rel=1e-6)


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_a_run_of_fsdp_continues_on_fewer_ranks(engine, folder, data, tmp_path, warm):
    shutil.copytree(folder / "straight/fsdp-flow", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    words = train_words(
        "flow",
        data,
        *EVERY[:-1],
        f"engine={engine}",
        "trainer.accumulate=2",
        "trainer.steps=6",
        "run_dir=run",
    )
    assert "resuming at step 3" in warm("train", *words, cwd=tmp_path).stdout
    one, other = metrics(tmp_path / "run")[-1], metrics(folder / "straight/fsdp-flow")[-1]
    assert one["step"] == other["step"] == 6
    assert one["valid/loss"] == pytest.approx(other["valid/loss"], rel=1e-6)


@pytest.mark.parametrize(
    "engine", [["engine=deepspeed", "engine.stage=3"], ["engine=fsdp"]], ids=lambda words: words[0]
)
def test_killed_and_started_again(engine, data, tmp_path, warm):
    words = train_words(
        "llm", data, "trainer.steps=4", "trainer.valid_every=2", "checkpoint.every=2", *engine
    )
    warm("train", *words, "run_dir=straight", cwd=tmp_path)
    for point in (("update", 4), ("weights", 1)):
        killed = warm.module("tests.resume.killer", *point, *words, "run_dir=killed", cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stdout, killed.stderr)
    ended = warm("train", *words, "run_dir=killed", cwd=tmp_path)
    assert "resuming at step 2" in ended.stdout and newest(tmp_path / "killed") == 4
    assert hashes(tmp_path / "killed", 4) == hashes(tmp_path / "straight", 4)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    if "deepspeed" in engine[0]:
        before = (tmp_path / "straight/config.yaml").read_bytes()
        other = [word for word in words if not word.startswith("engine")]
        refused = warm(
            "train", *other, "trainer.steps=6", "run_dir=straight", cwd=tmp_path, check=False
        )
        sentence(
            refused,
            "step_00000004 is in DeepSpeed's shards of stage 3 on 1 ranks, "
            "but this engine needs it whole",
            "init_from=",
        )
        assert (tmp_path / "straight/config.yaml").read_bytes() == before
