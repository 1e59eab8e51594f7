"""Sweeps: jobs do not share a folder, one that fails hides no other, and a table says what came of each."""

import csv
import json
import re
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import HydraException
from tensorboard import program

from cosyexp.cli.errors import user_message
from tests.support import (
    MODELS,
    RUNS,
    checkpoints,
    command,
    contents,
    metrics,
    sentence,
    train_words,
)


def table(said: str) -> list[dict[str, str]]:
    """The rows of the table at the end of what a sweep prints, cut where its columns begin."""
    lines = said.split("this table is also")[0].splitlines()
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
def swept(data, warm, tmp_path_factory):
    """Two learning rates."""
    folder = tmp_path_factory.mktemp("swept")
    said = warm(
        "train",
        "-m",
        *train_words("llm", data, "trainer.steps=1", "optimizer.lr=1e-3,3e-3"),
        cwd=folder,
    )
    return folder, table(said.stdout)


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
    assert [{**row, "valid_loss": f"{float(row['valid_loss']):.6g}"} for row in kept] == rows
    for row in kept:
        assert float(row["valid_loss"]) in [
            line.get("valid/loss") for line in metrics(folder / row["run_dir"])
        ]


def test_tensorboard_tells_the_runs_apart_by_their_settings_and_losses(swept):
    """Asks TensorBoard for what its page HParams shows."""
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


def test_the_same_sweep_goes_on_in_the_same_folders(swept, data, warm):
    folder, _ = swept
    before = folders(folder / "runs")
    said = warm(
        "train",
        "-m",
        *train_words("llm", data, "trainer.steps=2", "optimizer.lr=1e-3,3e-3"),
        cwd=folder,
    ).stdout
    assert said.count("resuming at step 1") == 2
    assert folders(folder / "runs") == before


def test_models_of_a_sweep_take_the_names_of_single_runs(data, warm, tmp_path):
    words = [
        "data=prepared",
        f"data.dir={data}",
        "data.processes=1",
        "trainer.steps=0",
        "trainer.previews=0",
    ]
    said = warm("train", "-m", "model=llm,hifigan", *words, cwd=tmp_path).stdout
    assert [row["run_dir"] for row in table(said)] == ["runs/demo/llm", "runs/demo/hifigan"]
    assert folders(tmp_path / "runs") == {"demo/llm", "demo/hifigan"}


def test_values_that_no_folder_can_be_named_by_still_get_folders_of_their_own(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=0", "optimizer.betas=[0.9,0.99],[0.8,0.99]")
    said = warm("train", "-m", *words, cwd=tmp_path).stdout
    names = [row["run_dir"] for row in table(said)]
    assert len(set(names)) == 2 and folders(tmp_path) == set(names)
    assert not any(character in name for name in names for character in ",=[]")


def test_a_failed_job_hides_no_other(data, warm, tmp_path):
    words = train_words("llm", f"nowhere,{data}", "trainer.steps=1")
    said = warm("train", "-m", *words, cwd=tmp_path, check=False)
    sentence(said, "nowhere is no prepared data set")
    rows = table(said.stdout)
    assert [row["status"] for row in rows] == ["failed", "completed"]
    assert (
        "nowhere is no prepared data set" in rows[0]["error"] and float(rows[1]["valid_loss"]) > 0
    )
    assert checkpoints(tmp_path / rows[1]["run_dir"])[-1] == "step_00000001"


def test_a_sweeper_finds_settings_by_the_validation_loss(data, warm, tmp_path):
    words = train_words(
        "llm", data, "trainer.steps=1", "hydra/sweeper=search", "hydra.sweeper.n_trials=3"
    )
    rows = table(warm("train", "-m", *words, cwd=tmp_path).stdout)
    assert len({row["run_dir"] for row in rows}) == 3
    (path,) = tmp_path.glob("multirun/train/*/optimization_results.yaml")
    found = yaml.safe_load(path.read_text())
    best = min(rows, key=lambda row: float(row["valid_loss"]))
    assert best["overrides"] == f"optimizer.lr={found['best_params']['optimizer.lr']}"
    assert f"{found['best_value']:.6g}" == best["valid_loss"]


def test_jobs_side_by_side_on_this_machine(data, warm, tmp_path):
    """Each in a process of its own, with a log of its own; of two ranks each."""
    words = train_words(
        "llm",
        f"nowhere,{data}",
        "trainer.steps=1",
        "hydra/launcher=local",
        "hydra.launcher.tasks_per_node=2",
    )
    said = warm("train", "-m", *words, cwd=tmp_path, check=False)
    sentence(said, "nowhere is no prepared data set")
    rows = table(said.stdout)
    assert [row["status"] for row in rows] == ["failed", "completed"]
    assert "nowhere is no prepared data set" in rows[0]["error"]
    assert len(list((tmp_path / rows[1]["run_dir"] / "logs").glob("rank_*.log"))) == 2
    named = re.findall(
        r"^job \d, data.dir=.*: local job \d+, whose log is (\S+)$", said.stdout, re.MULTILINE
    )
    assert ["nowhere is no" in (tmp_path / log).read_text() for log in named] == [True, False]
    assert "done at step 1" in (tmp_path / named[1]).read_text()


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    sentence(
        command("train", "-m", "seed=1,2", cwd=tmp_path, check=False),
        "a sweep (-m) starts its ranks itself",
    )


def test_a_launcher_whose_package_is_missing_says_how_to_get_it():
    said = "In 'hydra/launcher/slurm': Could not find 'hydra/launcher/submitit_slurm'"
    assert (
        user_message(HydraException(said))
        == "hydra/launcher= needs a package that is not installed: pip install 'cosyexp[slurm]'"
    )


def test_two_jobs_in_one_run_directory_are_refused(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=1", "optimizer.lr=1e-3,3e-3", "run_dir=same")
    said = warm("train", "-m", *words, cwd=tmp_path, check=False)
    sentence(said, "same was begun with", "optimizer.lr=0.001, not 0.003", "run_dir=")
    assert [row["status"] for row in table(said.stdout)] == ["completed", "failed"]
    assert yaml.safe_load((tmp_path / "same/config.yaml").read_text())["optimizer"]["lr"] == 0.001


def test_a_misspelled_word_ends_a_sweep_before_its_first_job(data, warm, tmp_path):
    said = warm(
        "train", "-m", *train_words("llm", data, "trainer.stepz=1,2"), cwd=tmp_path, check=False
    )
    sentence(said, "trainer.stepz", "Did you mean steps?")
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def copies(trained, tmp_path_factory) -> Path:
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


def test_a_failed_average_hides_no_other(copies, warm):
    said = warm(
        "average",
        "-m",
        "run_dir=runs/demo/llm,nowhere,runs/demo/flow",
        "num=3",
        cwd=copies,
        check=False,
    )
    sentence(said, "nowhere is no run directory")
    assert [row["status"] for row in table(said.stdout)] == ["completed", "failed", "completed"]


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


def test_readings_of_several_seeds_do_not_overwrite_one_another(copies, warm):
    rows = table(warm("synthesize", "-m", "seed=0,1", "text=hello", *RUNS, cwd=copies).stdout)
    assert len({(copies / row["result"]).read_bytes() for row in rows}) == 2
