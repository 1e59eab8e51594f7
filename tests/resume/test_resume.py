"""A run that was killed or stopped and started again ends like an uninterrupted one, bit by bit.

Kills at chosen points of the code are in test_kill_llm.py, test_kill_flow.py, test_kill_hifigan.py.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.resume.checks import newest
from tests.support import checkpoints, command, environment, metrics, train_words

STARTED = 6  # lines of metrics after which a run is well under way


def start(words: Sequence[str], cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a training as a user does; its output goes to a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "cosyexp.train", *words],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    """Waits for a condition, for the end of a process, or for two minutes."""
    limit = time.monotonic() + 120
    while not condition() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)


def kill_after_checkpoint(words: Sequence[str], run: Path, delay: float) -> tuple[int, str]:
    """Trains, and kills the process `delay` seconds after it wrote a checkpoint, if it still runs.

    Returns:
        The exit status and the output.
    """
    before = newest(run)
    child = start(words, run.parent)
    wait_until(lambda: newest(run) != before, child)
    time.sleep(delay)
    child.kill()
    output, _ = child.communicate()
    return child.returncode, output


def under_way(run: Path) -> bool:
    """Whether a run has logged some steps."""
    path = run / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) >= STARTED


def test_killed_from_outside_at_random_times(data, tmp_path, warm):
    """SIGKILL at random moments after a new checkpoint appears, in processes started from cold."""
    words = train_words(
        "flow", data, "trainer.steps=16", "trainer.valid_every=8", "checkpoint.every=1"
    )
    warm("train", *words, "run_dir=straight", cwd=tmp_path)
    run, draw, kills = tmp_path / "killed", random.Random(0), 0
    while kills < 3:
        status, output = kill_after_checkpoint([*words, "run_dir=killed"], run, draw.random() * 0.3)
        if status != -signal.SIGKILL:
            break
        kills += 1
    assert kills > 1, output
    warm("train", *words, "run_dir=killed", cwd=tmp_path)
    last = "checkpoints/step_00000016/flow.safetensors"
    assert (run / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()
    assert metrics(run) == metrics(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(number, data, tmp_path):
    words = train_words(
        "llm", data, "trainer.steps=100000", "checkpoint.every=0", "data.workers=2", "run_dir=run"
    )
    child = start(words, tmp_path)
    wait_until(lambda: under_way(tmp_path / "run"), child)
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
    """SLURM signals all processes of a job: ranks, workers, helpers of Python; here twice."""
    words = train_words(
        "llm", data, "trainer.steps=100000", "checkpoint.every=0", "data.workers=1", "run_dir=run"
    )
    words = [*words, f"engine.nproc_per_node={ranks}"]
    child = start(words, tmp_path, start_new_session=True)
    wait_until(lambda: under_way(tmp_path / "run"), child)
    for _ in range(2):
        os.killpg(child.pid, signal.SIGUSR2)
        time.sleep(0.01)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and "Traceback" not in out, out
    assert out.count("stopped at step") == 1
    assert len(checkpoints(tmp_path / "run")) == 1


def test_stopped_runs_end_like_uninterrupted_ones(data, tmp_path, warm):
    """A stop saves between regular checkpoints, even within a validation, which is repeated."""
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


def test_a_damaged_checkpoint_is_skipped(data, tmp_path, warm):
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
    """Batches and random numbers stay the same, so that results differ by rounding only."""
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
