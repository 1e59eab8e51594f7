"""Killed anywhere and started again by the same command, a run ends with the weights of an uninterrupted one, to the last bit."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import MODELS, checkpoints, command, environment, metrics, train_words

STEPS = 12
EVERY = [
    "trainer.steps=12",
    "trainer.valid_every=4",
    "checkpoint.every=2",
    "checkpoint.keep_best=2",
]
VARIANTS = {
    "plain": [],
    "workers": ["data.workers=2"],
    "accumulate": ["trainer.accumulate=2", "trainer.valid_epochs=1"],
    "ema": ["trainer.ema=0.9", "trainer.running_sum=true", "trainer.max_grad_norm=1.0"],
}
# where each start dies; the start after the last one ends by itself
DEATHS = [("update", 5), ("weights", 2), ("step", 2), ("update", 3), ("rename", 2), ("meta", 1)]


def hashes(run: Path, step: int = STEPS) -> dict[str, str]:
    """Of the weights of the last checkpoint."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def newest(run: Path) -> int:
    """The step of the newest checkpoint, -1 where there is none."""
    return max(
        (int(path.name[5:]) for path in (run / "checkpoints").glob("step_????????")), default=-1
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_killed_and_started_again(model, variant, data, tmp_path, warm):
    words = train_words(model, data, *EVERY, *VARIANTS[variant])
    warm("train", *words, "run_dir=straight", cwd=tmp_path)
    for point in DEATHS:
        killed = warm.module("tests.resume.killer", *point, *words, "run_dir=killed", cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stdout, killed.stderr)
    ended = warm("train", *words, "run_dir=killed", cwd=tmp_path)
    assert "resuming at step" in ended.stdout
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "straight")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    assert checkpoints(tmp_path / "killed") == checkpoints(tmp_path / "straight")


def test_killed_from_outside_at_random_times(data, tmp_path, warm):
    """SIGKILL soon after a new checkpoint is seen, at moments that nobody chose, in processes that share nothing."""
    words = train_words(
        "flow", data, "trainer.steps=16", "trainer.valid_every=8", "checkpoint.every=1"
    )
    warm("train", *words, "run_dir=straight", cwd=tmp_path)
    run, draw, kills = tmp_path / "killed", random.Random(0), 0
    while kills < 6:
        before = newest(run)
        with open(tmp_path / "said", "w") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "cosyexp.train", *words, "run_dir=killed"],
                cwd=tmp_path,
                env=environment(),
                stdout=said,
                stderr=said,
            )
        limit = time.monotonic() + 120
        while child.poll() is None and newest(run) == before and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        if child.wait() != -signal.SIGKILL:
            break
        kills += 1
    assert kills > 2, (tmp_path / "said").read_text()
    warm("train", *words, "run_dir=killed", cwd=tmp_path)
    last = "checkpoints/step_00000016/flow.safetensors"
    assert (run / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()
    assert metrics(run) == metrics(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(number, data, tmp_path):
    words = train_words(
        "llm", data, "trainer.steps=100000", "checkpoint.every=0", "data.workers=2", "run_dir=run"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "cosyexp.train", *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while (
        not path.exists() or len(path.read_text().splitlines()) < 6
    ) and time.monotonic() < limit:
        time.sleep(0.05)
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0, out
    (stopped,) = [line for line in out.splitlines() if "stopped at step" in line]
    step = int(stopped.split("stopped at step ")[1].split(",")[0].split(":")[0])
    assert step > 0 and f"step_{step:08d}" in checkpoints(tmp_path / "run")
    again = command(
        "train",
        *words[:-2],
        "run_dir=run",
        f"trainer.steps={step + 2}",
        "data.workers=0",
        cwd=tmp_path,
    )
    assert f"resuming at step {step}" in again.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_preemption_that_reaches_every_process_stops_the_run_once(ranks, data, tmp_path):
    """SLURM signals all that a job started: ranks, their workers, Python's helpers; here twice."""
    words = train_words(
        "llm", data, "trainer.steps=100000", "checkpoint.every=0", "data.workers=1", "run_dir=run"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "cosyexp.train", *words, f"engine.nproc_per_node={ranks}"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    path, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while (
        not path.exists() or len(path.read_text().splitlines()) < 6
    ) and time.monotonic() < limit:
        time.sleep(0.05)
    for _ in range(2):
        os.killpg(child.pid, signal.SIGUSR2)
        time.sleep(0.01)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and "Traceback" not in out, out
    assert out.count("stopped at step") == 1
    assert len(checkpoints(tmp_path / "run")) == 1


def test_stopped_runs_end_like_uninterrupted_ones(data, tmp_path, warm):
    """A stop saves between the regular checkpoints, even within a validation; what was missed is made up for."""
    words = train_words(
        "hifigan", data, "trainer.steps=6", "trainer.valid_every=3", "checkpoint.every=3"
    )
    warm("train", *words, "run_dir=straight", cwd=tmp_path)
    for point in ("validation", "step"):
        result = warm.module("tests.resume.stopper", point, *words, "run_dir=stopped", cwd=tmp_path)
        assert result.returncode == 0 and "stopped at step" in result.stdout, (
            result.stdout + result.stderr
        )
    warm("train", *words, "run_dir=stopped", cwd=tmp_path)
    last = "checkpoints/step_00000006/hifigan.safetensors"
    assert (tmp_path / "stopped" / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, warm):
    words = train_words("llm", data, "trainer.steps=4", "checkpoint.every=2", "run_dir=run")
    warm("train", *words, cwd=tmp_path)
    wanted = (tmp_path / "run/checkpoints/step_00000004/llm.safetensors").read_bytes()
    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.unlink(),
    ):
        damage(tmp_path / "run/checkpoints/step_00000004/llm.safetensors")
        again = warm("train", *words, cwd=tmp_path)
        assert "step_00000004 is skipped" in again.stdout and "resuming at step 2" in again.stdout
        assert (tmp_path / "run/checkpoints/step_00000004/llm.safetensors").read_bytes() == wanted


def test_resumes_on_another_number_of_ranks(data, tmp_path, warm):
    """The plan and the draws stay; the numbers differ by rounding alone."""
    words = train_words("flow", data, "trainer.steps=6", "checkpoint.every=3")
    warm("train", *words, "trainer.accumulate=2", "run_dir=one", cwd=tmp_path)
    warm("train", *words, "trainer.accumulate=2", "run_dir=two", "trainer.steps=3", cwd=tmp_path)
    warm(
        "train",
        *words,
        "trainer.accumulate=1",
        "run_dir=two",
        "engine.nproc_per_node=2",
        cwd=tmp_path,
    )
    one, two = (metrics(tmp_path / run)[-1] for run in ("one", "two"))
    assert one["step"] == two["step"] == 6
    assert abs(one["valid/loss"] / two["valid/loss"] - 1) < 1e-5
