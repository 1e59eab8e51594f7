"""mode=dpo by the commands."""

import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cosyexp.training.evaluate import evaluator
from tests.apps.warm import Warm
from tests.support import checkpoints, metrics, sentence, train_words

EVERY = ["trainer.steps=8", "trainer.valid_every=4", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def folder(data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sft run `sft`, and `pairs`: its data with a rejected answer for four rows of five."""
    folder, draw = tmp_path_factory.mktemp("preference"), np.random.default_rng(0)
    shutil.copytree(data, folder / "pairs", ignore=shutil.ignore_patterns("*.fields"))
    for path in (folder / "pairs").rglob("*.parquet"):
        table = pq.read_table(path)
        answers = table["speech_token"].to_pylist()
        rejected = [
            None if i % 5 == 4 else draw.permutation(answer)[draw.integers(4) :].tolist()
            for i, answer in enumerate(answers)
        ]
        pq.write_table(
            table.append_column("reject_speech_token", pa.array(rejected, pa.list_(pa.int32()))),
            path,
        )
    warm("train", *train_words("llm", data, "trainer.steps=4", "run_dir=sft"), cwd=folder)
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return train_words(
        "llm", folder / "pairs", "mode=dpo", f"init_from={folder}/sft", *EVERY, *more
    )


@pytest.fixture(scope="module")
def straight(folder: Path, warm: Warm) -> Path:
    """An uninterrupted run, with a live reference model."""
    output = warm("train", *words(folder, "run_dir=straight"), cwd=folder).stdout
    assert "has no reject_speech_token" in output  # named, but not counted as bad
    return folder / "straight"


def last(run: Path) -> bytes:
    return (run / "checkpoints/step_00000008/llm.safetensors").read_bytes()


def test_a_run_begins_as_its_own_reference(straight):
    first = metrics(straight)[0]
    assert first["step"] == 0
    assert abs(first["valid/dpo_loss"] - np.log(2)) < 1e-7 and first["valid/accuracy"] == 0.5
    assert (
        first["valid/chosen_reward"] == first["valid/rejected_reward"] == first["valid/margin"] == 0
    )
    names = {
        "loss",
        "dpo_loss",
        "sft_loss",
        "acc",
        "accuracy",
        "chosen_reward",
        "rejected_reward",
        "margin",
    }
    assert {f"train/{name}" for name in names} <= metrics(straight)[1].keys()


@pytest.mark.parametrize(
    "engine", [["engine=fsdp"], ["engine=deepspeed", "engine.stage=3"]], ids=lambda words: words[0]
)
def test_a_live_reference_with_a_sharded_policy(folder, straight, warm, tmp_path, engine):
    warm("train", *words(folder, *engine, "run_dir=sharded"), cwd=tmp_path)
    for ours, theirs in zip(metrics(tmp_path / "sharded"), metrics(straight), strict=True):
        assert ours == pytest.approx(
            theirs, rel=1e-4, abs=1e-5
        )  # rewards are 5 times a difference of log-probabilities


def test_a_cached_reference_trains_as_a_live_one(folder, straight, warm, tmp_path):
    cache = ["objective.cache_reference=true", "run_dir=cached"]
    warm("train", *words(folder, *cache), cwd=tmp_path)
    assert metrics(tmp_path / "cached") == metrics(straight) and last(tmp_path / "cached") == last(
        straight
    )
    more = [
        "trainer.steps=9",
        "init_from=null",
        "reference=gone",
    ]  # neither is needed any more
    with pytest.raises(AssertionError, match="was begun with reference"):
        warm("train", *words(folder, *cache, *more), cwd=tmp_path)
    output = warm(
        "train", *words(folder, *cache, "trainer.steps=9", "init_from=gone"), cwd=tmp_path
    ).stdout
    assert "done at step 9" in output


def test_the_cache_of_another_objective_is_not_used(folder, straight, warm, tmp_path):
    more = words(folder, "objective.cache_reference=true", "run_dir=cached", "trainer.steps=2")
    warm("train", *more, "objective.normalize=sum", cwd=tmp_path)
    kept = (tmp_path / "cached/reference/logps.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "cached/checkpoints")  # as if it had been killed before the first
    assert "computing the log-probabilities" in warm("train", *more, cwd=tmp_path).stdout
    assert (tmp_path / "cached/reference/logps.safetensors").read_bytes() != kept
    assert metrics(tmp_path / "cached")[0] == metrics(straight)[0]


@pytest.mark.parametrize(
    "variant", [[], ["objective.cache_reference=true", "data.workers=2"]], ids=["live", "cached"]
)
def test_killed_and_started_again(folder, straight, warm, tmp_path, variant):
    for point in (("update", 3), ("weights", 2), ("rename", 2)):
        killed = warm.module(
            "tests.resume.killer", *point, *words(folder, "run_dir=killed", *variant), cwd=tmp_path
        )
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    warm("train", *words(folder, "run_dir=killed", *variant), cwd=tmp_path)
    assert metrics(tmp_path / "killed") == metrics(straight) and last(tmp_path / "killed") == last(
        straight
    )
    assert checkpoints(tmp_path / "killed") == checkpoints(straight)


def test_two_ranks_are_two_micro_batches(folder, warm, tmp_path):
    warm("train", *words(folder, "trainer.accumulate=2", "run_dir=one"), cwd=tmp_path)
    warm("train", *words(folder, "engine.nproc_per_node=2", "run_dir=two"), cwd=tmp_path)
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(
            abs(ours[name] - theirs[name]) <= 1e-5 * max(1, abs(ours[name])) for name in ours
        ), (ours, theirs)


def test_weights_are_measured_against_the_reference_as_in_training(straight):
    checkpoint = straight / "checkpoints/step_00000008"
    assert (
        evaluator(straight)(checkpoint / "llm.safetensors")
        == yaml.safe_load((checkpoint / "meta.yaml").read_text())["loss_dict"]
    )


def test_average_and_export_work_as_on_any_run(straight, warm):
    warm("average", f"run_dir={straight}", "num=2", cwd=straight.parent)
    warm("export", f"run_dir={straight}", "format=jit", "weights=average", cwd=straight.parent)
    assert (straight / "exports/jit/llm.decode.fp32.zip").exists()


def test_other_losses_train(folder, warm, tmp_path):
    for loss in ("cdpo", "ipo", "hinge", "simpo"):
        more = [
            f"objective.loss={loss}",
            "trainer.steps=2",
            f"run_dir={loss}",
            *(["init_from=null"] if loss == "simpo" else []),
        ]
        warm("train", *words(folder, *more), cwd=tmp_path)
        assert np.isfinite(metrics(tmp_path / loss)[-1]["valid/loss"])


def test_refused_references(folder, straight, warm, tmp_path):
    def refused(*more: str) -> subprocess.CompletedProcess[str]:
        return warm("train", *words(folder, "run_dir=refused", *more), cwd=tmp_path, check=False)

    sentence(refused("init_from=null"), "give reference=")
    sentence(refused("reference=nothing.pt"), "nothing.pt")
    sentence(refused("objective.loss=dop"), "dop", "dpo, cdpo, ipo, hinge, simpo")
    sentence(refused(f"data.dir={folder}/../nowhere"), "nowhere")
    assert not (tmp_path / "refused/checkpoints").exists()


def test_a_run_resumes_only_with_its_own_reference(folder, straight, warm, tmp_path):
    shutil.copytree(folder / "sft", tmp_path / "sft")
    begin = words(folder, f"init_from={tmp_path}/sft", "run_dir=run", "trainer.steps=2")
    warm("train", *begin, cwd=tmp_path)
    shutil.copytree(
        straight / "checkpoints/step_00000008", tmp_path / "sft/checkpoints/step_00000099"
    )
    output = warm("train", *begin, "trainer.steps=4", cwd=tmp_path, check=False)
    sentence(output, "was started with the reference", "step_00000004")
