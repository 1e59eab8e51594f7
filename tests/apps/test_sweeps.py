"""Sweeps: each job has a folder, a failed one stops no other, and a table shows how each ended."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard import program

from tests.apps.warm import Warm
from tests.support import (
    MODELS,
    RUNS,
    checkpoints,
    command,
    contents,
    environment,
    metrics,
    sentence,
    train_words,
)


def table(output: str) -> list[dict[str, str]]:
    """The rows of the table that a sweep prints last, cut where its columns begin."""
    lines = output.split("this table is also")[0].splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["job", "status"])
    names = lines[start].split()
    edges = [*(lines[start].index(name) for name in names), None]
    return [
        {name: line[a:b].strip() for name, a, b in zip(names, edges, edges[1:], strict=False)}
        for line in lines[start + 1 :]
    ]


def folders(root: Path) -> set[str]:
    return {str(path.parent.relative_to(root)) for path in root.rglob("config.yaml")}


@pytest.fixture(scope="module")
def swept(
    data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, str]]]:
    """A sweep over two learning rates: its folder and table."""
    folder = tmp_path_factory.mktemp("swept")
    output = warm(
        "train",
        "-m",
        *train_words("llm", data, "trainer.steps=1", "optimizer.lr=1e-3,3e-3"),
        cwd=folder,
    )
    return folder, table(output.stdout)


def test_runs_are_named_by_what_is_swept(swept):
    folder, _ = swept
    assert folders(folder / "runs") == {
        "demo/llm+optimizer.lr-0.001",
        "demo/llm+optimizer.lr-0.003",
    }


def test_the_table_has_overrides_result_and_run_directory(swept):
    folder, rows = swept
    assert list(rows[0]) == ["job", "status", "overrides", "valid_loss", "steps", "time", "run_dir"]
    assert [row["job"] for row in rows] == ["0", "1"]
    assert {row["status"] for row in rows} == {"completed"} and {row["steps"] for row in rows} == {
        "1"
    }
    for row in rows:
        assert row["overrides"] == f"optimizer.lr={row['run_dir'].split('lr-')[1]}"
        best = min(
            line["valid/loss"] for line in metrics(folder / row["run_dir"]) if "valid/loss" in line
        )
        assert row["valid_loss"] == f"{best:.6g}" and float(row["time"]) > 0


def test_the_table_is_kept_as_csv_with_all_digits(swept):
    folder, rows = swept
    (path,) = folder.glob("multirun/train/*/sweep.csv")
    kept = list(csv.DictReader(path.read_text().splitlines()))
    short = {"valid_loss": ".6g", "time": ".6g"}
    rounded = [
        {**row, **{k: f"{float(row[k]):{form}}" for k, form in short.items()}} for row in kept
    ]
    assert rounded == rows
    for row in kept:
        assert float(row["valid_loss"]) in [
            line.get("valid/loss") for line in metrics(folder / row["run_dir"])
        ]


def test_tensorboard_shows_the_settings_and_losses_of_the_runs(swept):
    """Requests what the HParams page of TensorBoard shows."""
    folder, rows = swept
    board = program.TensorBoard()
    board.configure(logdir=str(folder / "runs"), port=0, host="127.0.0.1", load_fast="false")
    page = f"{board.launch()}data/plugin/hparams/"

    def ask(what: str, **question: object) -> dict[str, Any]:
        asked = urllib.request.Request(
            page + what, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)

    groups: list[dict[str, Any]] = []
    limit = time.monotonic() + 60
    while len(groups) < 2 and time.monotonic() < limit:
        time.sleep(0.2)
        metrics_there = [
            {"metric": info["name"]} for info in ask("experiment").get("metricInfos", [])
        ]
        question = {
            "startIndex": 0,
            "sliceSize": 10,
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
        }
        groups = ask("session_groups", **question, colParams=metrics_there).get("sessionGroups", [])
    shown = {group["hparams"]["optimizer.lr"]: metrics_of(group)["valid/loss"] for group in groups}
    assert set(shown) == {0.001, 0.003}
    for row in rows:
        assert shown[float(row["overrides"].split("=")[1])] == pytest.approx(
            float(row["valid_loss"]), rel=1e-5
        )


def metrics_of(group: dict[str, Any]) -> dict[str, float]:
    return {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}


def test_the_same_sweep_resumes_in_the_same_folders(swept, data, warm):
    folder, _ = swept
    before = folders(folder / "runs")
    output = warm(
        "train",
        "-m",
        *train_words("llm", data, "trainer.steps=2", "optimizer.lr=1e-3,3e-3"),
        cwd=folder,
    ).stdout
    assert output.count("resuming at step 1") == 2
    assert folders(folder / "runs") == before


def test_models_of_a_sweep_take_the_names_of_single_runs(data, warm, tmp_path):
    words = [
        "data=prepared",
        f"data.dir={data}",
        "data.processes=1",
        "trainer.steps=0",
        "trainer.previews=0",
    ]
    output = warm("train", "-m", "model=llm,hifigan", *words, cwd=tmp_path).stdout
    assert [row["run_dir"] for row in table(output)] == ["runs/demo/llm", "runs/demo/hifigan"]
    assert folders(tmp_path / "runs") == {"demo/llm", "demo/hifigan"}


def test_values_that_no_file_name_can_hold_get_separate_folders(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=0", "optimizer.betas=[0.9,0.99],[0.8,0.99]")
    output = warm("train", "-m", *words, cwd=tmp_path).stdout
    names = [row["run_dir"] for row in table(output)]
    assert len(set(names)) == 2 and folders(tmp_path) == set(names)
    assert not any(character in name for name in names for character in ",=[]")


def test_a_failed_job_stops_no_other(data, warm, tmp_path):
    words = train_words("llm", Path(f"nowhere,{data}"), "trainer.steps=1")
    output = warm("train", "-m", *words, cwd=tmp_path, check=False)
    sentence(output, "nowhere is not a prepared data set")
    rows = table(output.stdout)
    assert [row["status"] for row in rows] == ["failed", "completed"]
    assert (
        "nowhere is not a prepared data set" in rows[0]["error"]
        and float(rows[1]["valid_loss"]) > 0
    )
    assert checkpoints(tmp_path / rows[1]["run_dir"])[-1] == "step_00000001"


def test_jobs_side_by_side_on_this_machine(data, warm, tmp_path):
    """Each job is a process with its own log; here it starts two ranks."""
    words = train_words(
        "llm",
        Path(f"nowhere,{data}"),
        "trainer.steps=1",
        "hydra/launcher=local",
        "hydra.launcher.tasks_per_node=2",
    )
    output = warm("train", "-m", *words, cwd=tmp_path, check=False)
    sentence(output, "nowhere is not a prepared data set")
    rows = table(output.stdout)
    assert [row["status"] for row in rows] == ["failed", "completed"]
    assert "nowhere is not a prepared data set" in rows[0]["error"]
    assert len(list((tmp_path / rows[1]["run_dir"] / "logs").glob("rank_*.log"))) == 2
    named = re.findall(
        r"^job \d, data.dir=.*: local job \d+, log (\S+)$", output.stdout, re.MULTILINE
    )
    assert ["nowhere is not a prepared" in (tmp_path / log).read_text() for log in named] == [
        True,
        False,
    ]
    assert "done at step 1" in (tmp_path / named[1]).read_text()


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    sentence(
        command("train", "-m", "seed=1,2", cwd=tmp_path, check=False),
        "a sweep (-m) starts its ranks itself",
    )


WITHOUT = """
import sys
for name in {packages}:
    sys.modules[name] = None
from cosyexp.train import main
main()
"""
SUBMITIT = ["submitit", "hydra_plugins.hydra_submitit_launcher"]
PACKAGES = {
    "launcher=slurm": ("hydra-submitit-launcher", SUBMITIT),
    "launcher=local": ("hydra-submitit-launcher", SUBMITIT),
    "sweeper=optuna": ("'cosyexp[optuna]'", ["optuna"]),
}


def without(packages: list[str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Trains where packages are not installed; warnings are shown."""
    env = {key: value for key, value in environment().items() if key != "PYTHONWARNINGS"}
    code = WITHOUT.format(packages=packages)
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("option", PACKAGES)
def test_an_option_whose_package_is_missing_names_it(option, tmp_path):
    install, packages = PACKAGES[option]
    result = without(packages, "-m", f"hydra/{option}", "seed=1,2", cwd=tmp_path)
    name = sentence(result, "a package that is not installed", f"pip install {install}")
    assert result.stderr.strip() == name


def test_the_packages_of_a_sweep_are_not_missed_without_one(tmp_path):
    packages = [name for _, names in PACKAGES.values() for name in names]
    result = without(packages, "--cfg", "job", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_two_jobs_in_one_run_directory_are_refused(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=1", "optimizer.lr=1e-3,3e-3", "run_dir=same")
    output = warm("train", "-m", *words, cwd=tmp_path, check=False)
    sentence(output, "same was begun with", "optimizer.lr=0.001, not 0.003", "run_dir=")
    assert [row["status"] for row in table(output.stdout)] == ["completed", "failed"]
    assert yaml.safe_load((tmp_path / "same/config.yaml").read_text())["optimizer"]["lr"] == 0.001


def test_a_misspelled_word_ends_a_sweep_before_its_first_job(data, warm, tmp_path):
    output = warm(
        "train", "-m", *train_words("llm", data, "trainer.stepz=1,2"), cwd=tmp_path, check=False
    )
    sentence(output, "there is no key trainer.stepz", "did you mean steps?")
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def copies(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return folder


def test_average_sweeps_over_runs_choices_and_numbers(copies, warm):
    runs = ",".join(f"runs/demo/{model}" for model in MODELS)
    rows = table(
        warm("average", "-m", f"run_dir={runs}", "select=best,last", "num=1,2", cwd=copies).stdout
    )
    assert len(rows) == 12 and {row["status"] for row in rows} == {"completed"}
    assert len({row["result"] for row in rows}) == 12
    for model in MODELS:
        assert {path.name for path in (copies / "runs/demo" / model / "averages").glob("*/")} == {
            "best1",
            "best2",
            "last1",
            "last2",
        }
    assert all((copies / row["result"]).is_file() for row in rows)
    before = contents(copies / "runs/demo")
    warm("average", "-m", f"run_dir={runs}", "select=best,last", "num=1,2", cwd=copies)
    assert contents(copies / "runs/demo") == before


def test_a_failed_average_stops_no_other(copies, warm):
    output = warm(
        "average",
        "-m",
        "run_dir=runs/demo/llm,nowhere,runs/demo/flow",
        "num=2",
        cwd=copies,
        check=False,
    )
    sentence(output, "nowhere is no")
    assert [row["status"] for row in table(output.stdout)] == ["completed", "failed", "completed"]


def test_a_list_is_one_job_and_a_sweep_over_it_several(copies, warm):
    words = [
        "run_dir=runs/demo/llm",
        "format=jit",
        "latency=false",
        "components=llm.prefill,llm.decode",
    ]
    assert "job " not in warm("export", *words, cwd=copies).stdout
    assert len(list((copies / "runs/demo/llm/exports/jit").glob("*.zip"))) == 2
    rows = table(warm("export", "-m", *words, "out=each", cwd=copies).stdout)
    assert [row["overrides"] for row in rows] == [
        "components=[llm.prefill]",
        "components=[llm.decode]",
    ]


def test_exports_of_other_weights_do_not_overwrite_one_another(copies, warm):
    first = "runs/demo/hifigan/checkpoints/step_00000000/hifigan.safetensors"
    rows = table(
        warm(
            "export",
            "-m",
            "run_dir=runs/demo/hifigan",
            "format=jit",
            "latency=false",
            f"weights=best,{first}",
            cwd=copies,
        ).stdout
    )
    assert len({row["result"] for row in rows}) == 2


def test_wavs_of_several_seeds_do_not_overwrite_one_another(copies, warm):
    rows = table(warm("synthesize", "-m", "seed=0,1", "text=hello", *RUNS, cwd=copies).stdout)
    assert len({(copies / row["result"]).read_bytes() for row in rows}) == 2
