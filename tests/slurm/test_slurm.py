"""hydra/launcher=slurm on a real SLURM of one node: sweeps, tasks, preemption, jobs that die."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import run, until
from tests.support import ROOT, command, metrics, train_words

PATIENCE = 300  # seconds, on a busy machine
QUEUE = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=30"]
STEPS = 120
LONG = [f"trainer.steps={STEPS}", "trainer.valid_every=60", "run_dir=run"]
LAST = f"checkpoints/step_{STEPS:08d}/llm.safetensors"


def sweep(env: dict[str, str], app: str, *words: str, cwd: Path) -> subprocess.Popen[str]:
    env = {**env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"cosyexp.{app}", "-m", *QUEUE, *words]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def table(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("multirun/*/*/sweep.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def logs(folder: Path) -> str:
    return "\n".join(
        path.read_text() for path in sorted(folder.glob("multirun/*/*/.submitit/*/*.out"))
    )


def job_of(folder: Path) -> str:
    """Returns SLURM's number of the only job of a sweep."""
    (path,) = folder.glob("multirun/*/*/.submitit/*/*_submitted.pkl")
    return path.name.split("_")[0]


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return (
        json.loads(path.read_text().splitlines()[-1])["step"]
        if path.exists() and path.read_text().endswith("}\n")
        else 0
    )


def preempt(env: dict[str, str], folder: Path, run_dir: Path) -> None:
    """Preempts a job as SLURM does, and starts it again without SLURM's delay of two minutes."""
    until(lambda: steps_done(run_dir) > 5, "it trains", PATIENCE)
    job = job_of(folder)
    run(env, "scancel", "--signal=USR2", job)

    def pending() -> bool:
        return "JobState=PENDING" in run(env, "scontrol", "show", "job", job)

    until(pending, "it is back in the queue", PATIENCE)
    until(lambda: "stopped at step" in logs(folder), "it has stopped", PATIENCE)
    until(
        lambda: run(env, "sinfo", "--noheader", "--format=%T").strip() == "idle",
        "its processes are gone",
        PATIENCE,
    )

    # a node takes a job that starts in the second of its end for the old one
    run(env, "scontrol", "update", f"jobid={job}", "StartTime=now+2")
    until(lambda: not pending(), "it starts again", PATIENCE)


def test_two_trainings_in_the_queue(slurm, data, tmp_path):
    words = train_words("llm", data, "trainer.steps=2", "optimizer.lr=1e-3,3e-3")
    code, out, err = ended(sweep(slurm, "train", *words, cwd=tmp_path))
    assert code == 0, out + err + logs(tmp_path)
    rows = table(tmp_path)
    assert [row["overrides"] for row in rows] == ["optimizer.lr=0.001", "optimizer.lr=0.003"]
    for row in rows:
        best = min(
            line["valid/loss"]
            for line in metrics(tmp_path / row["run_dir"])
            if "valid/loss" in line
        )
        assert (row["status"], row["steps"], float(row["valid_loss"])) == ("completed", "2", best)
        assert row["run_dir"] == f"runs/demo/llm+{row['overrides'].replace('=', '-')}"
    assert (
        len(
            re.findall(
                r"^job \d, optimizer.lr=.*: slurm job \d+_\d, log multirun/",
                out,
                re.MULTILINE,
            )
        )
        == 2
    )
    assert logs(tmp_path).count("done at step 2") == 2

    averages = [f"run_dir={','.join(row['run_dir'] for row in rows)}", "select=best,last", "num=1"]
    code, out, err = ended(sweep(slurm, "average", *averages, cwd=tmp_path))
    assert code == 0, out + err + logs(tmp_path)
    for row in rows:
        assert {path.name for path in (tmp_path / row["run_dir"] / "averages").glob("*/")} == {
            "best1",
            "last1",
        }

    exports = [averages[0], "format=official,jit", "weights=average", "latency=false"]
    code, out, err = ended(sweep(slurm, "export", *exports, cwd=tmp_path))
    assert code == 0, out + err + logs(tmp_path)
    for row in rows:
        files = {
            path.relative_to(tmp_path / row["run_dir"] / "exports").as_posix()
            for path in tmp_path.glob(f"{row['run_dir']}/exports/*/*")
        }
        assert {"official/llm.pt", "jit/llm.text_encoder.fp32.zip", "jit/llm.llm.fp32.zip"} <= files


def test_a_training_under_srun(slurm, data, tmp_path):
    words = train_words("flow", data, "trainer.steps=2", "run_dir=run")
    srun = ["srun", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, "-m", "cosyexp.train"]
    env = {**slurm, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*srun, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done at step 2") == 1
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {"rank_0.log", "rank_1.log"}


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by two ranks, without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    command("train", *train_words("llm", data, *LONG), "engine.nproc_per_node=2", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("how", ["hydra.launcher.tasks_per_node=2", "engine.nproc_per_node=2"])
def test_a_preempted_job_resumes_and_ends_like_an_uninterrupted_one(
    how, slurm, data, tmp_path, straight
):
    """Two ranks, as tasks of SLURM or started by one task, stop at the same step."""
    process = sweep(slurm, "train", *train_words("llm", data, *LONG), how, cwd=tmp_path)
    try:
        preempt(slurm, tmp_path, tmp_path / "run")
        code, out, err = ended(process)
    finally:
        process.kill()
    assert code == 0, out + err + logs(tmp_path)
    output, found = logs(tmp_path), tmp_path / "run"
    (step,) = re.findall(r"stopped at step (\d+)", output)
    assert 0 < int(step) < STEPS and output.count(f"resuming at step {step}") == 1
    assert [(row["status"], row["steps"]) for row in table(tmp_path)] == [("completed", str(STEPS))]
    assert (found / LAST).read_bytes() == (straight / LAST).read_bytes()
    assert metrics(found) == metrics(straight)


def test_a_job_that_is_killed_stops_no_other(slurm, data, tmp_path):
    process = sweep(
        slurm, "train", *train_words("llm", data, "trainer.steps=1,1000000"), cwd=tmp_path
    )
    try:
        until(
            lambda: len(list(tmp_path.glob("runs/demo/*/metrics.jsonl"))) == 2,
            "both train",
            PATIENCE,
        )
        (victim,) = [
            path for path in tmp_path.glob("multirun/*/*/.submitit/*") if path.name.endswith("_1")
        ]
        run(slurm, "scancel", "--signal=KILL", victim.name)
        code, out, err = ended(process)
    finally:
        process.kill()
    assert code == 1 and err.splitlines()[-1].startswith("cosyexp: job 1 ended without a result"), (
        out + err
    )
    rows = table(tmp_path)
    assert [(row["overrides"], row["status"]) for row in rows] == [
        ("trainer.steps=1", "completed"),
        ("trainer.steps=1000000", "failed"),
    ]
    assert os.path.exists(tmp_path / rows[1]["error"].split("see its log ")[1])
