"""Loggers: every step is there once, also in a run that was killed and resumed."""

import csv
import json
import signal
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cosyexp.cli.compose import compose_train
from cosyexp.errors import UserError
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.training.loggers.base import BufferedLogger, RunInfo
from cosyexp.training.loggers.csv import Csv
from cosyexp.training.loggers.jsonl import JsonLines
from tests.apps.warm import Warm
from tests.support import metrics, train_words

EVERY = ["trainer.valid_every=2", "checkpoint.every=2", "trainer.log_every=1"]


def killed_and_resumed(
    logger: str, data: Path, warm: Warm, folder: Path, env: Mapping[str, str] | None = None
) -> Path:
    """A run of six steps that was killed after step 3 was logged, before it was saved."""
    words = train_words("llm", data, *EVERY, f"logger=[jsonl,{logger}]", "trainer.steps=6")
    run = [*words, "run_dir=run"]
    killed = warm.module("tests.resume.killer", "step", "5", *run, cwd=folder, env=env)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    said = warm("train", *run, cwd=folder, env=env)
    assert "resuming at step 4" in said.stdout or "resuming at step 2" in said.stdout
    return folder / "run"


def by_step(run: Path, name: str) -> dict[int, float]:
    """The values of metrics.jsonl by step."""
    return {line["step"]: line[name] for line in metrics(run) if name in line}


def test_csv_holds_what_jsonl_holds(data, warm, tmp_path):
    run = killed_and_resumed("csv", data, warm, tmp_path)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(7))
    for name in ("train/loss", "valid/loss"):
        found = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert found == by_step(run, name)


def test_mlflow_goes_on_in_the_same_run(data, warm, tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = killed_and_resumed("mlflow", data, warm, tmp_path)
    store = client.MlflowClient(tracking_uri=(tmp_path / "runs/mlflow").as_uri())
    experiment = store.get_experiment_by_name("cosyexp")
    (found,) = store.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["trainer.steps"] == "6"
    for name in ("train/loss", "valid/loss"):
        history = store.get_metric_history(found.info.run_id, name)
        assert Counter(point.step for point in history) == Counter(by_step(run, name).keys())
        assert {point.step: point.value for point in history} == by_step(run, name)


def resumed(
    logger: str, data: Path, warm: Warm, folder: Path, env: Mapping[str, str] | None = None
) -> Path:
    """A run of four steps that goes on to six."""
    words = train_words("llm", data, *EVERY, f"logger=[jsonl,{logger}]", "run_dir=run")
    for steps in (4, 6):
        warm("train", *words, f"trainer.steps={steps}", cwd=folder, env=env)
    return folder / "run"


@pytest.mark.parametrize("start", [resumed, killed_and_resumed])
def test_trackio_goes_on_in_the_same_run(start, data, warm, tmp_path):
    """Trackio writes in the background: a killed run may lack steps, but has none twice."""
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    run = start("trackio", data, warm, tmp_path, {"TRACKIO_DIR": str(tmp_path / "trackio")})
    (database,) = (tmp_path / "trackio").glob("cosyexp*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {
        json.loads((run / "loggers/trackio.json").read_text())["id"]
    }
    found = [(step, json.loads(content)) for _, step, content in rows]
    compare([(step, row["train/loss"]) for step, row in found if "train/loss" in row], run, start)


@pytest.mark.parametrize("start", [resumed, killed_and_resumed])
def test_wandb_offline_goes_on_in_the_same_run(start, data, warm, tmp_path):
    """wandb writes in the background: a killed run may lack steps, but has none twice."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    run = start("wandb", data, warm, tmp_path, {"WANDB_MODE": "offline"})
    folders = sorted((run / "wandb").glob("offline-run-*"))
    identifier = json.loads((run / "loggers/wandb.json").read_text())["id"]
    assert len(folders) == 2 and all(path.name.endswith(identifier) for path in folders)
    compare([pair for folder in folders for pair in wandb_history(folder)], run, start)


def compare(found: list[tuple[int, float]], run: Path, start: object) -> None:
    """Asserts that the steps are those of metrics.jsonl; a killed run may lack its first ones."""
    expected = by_step(run, "train/loss")
    assert len(found) == len(dict(found))
    assert dict(found).items() <= expected.items() and {5, 6} <= dict(found).keys()
    if start is resumed:
        assert dict(found) == expected


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: fragments with a header of checksum, length and type, in blocks."""
    block, first, at, record = 32768, 7, 0, b""  # the file's own header is part of the first block
    while at + 7 <= len(content):
        if (left := block - (at + first) % block) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def wandb_history(folder: Path) -> list[tuple[int, float]]:
    """Steps and training losses in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    found = []
    for content in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        items = {
            item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
        }
        if "train/loss" in items:
            found.append((int(json.loads(items["_step"])), json.loads(items["train/loss"])))
    return found


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_not_installed_is_named(name, monkeypatch):
    for module in [name, *sys.modules]:
        if module.split(".")[0] == name:
            monkeypatch.setitem(sys.modules, module, None)
    node = compose_train([f"logger=[{name}]"]).logger[name]
    with pytest.raises(UserError, match=rf"logger={name} .*pip install 'cosyexp\[{name}\]'"):
        build(node, "logger")


def test_values_that_are_not_finite_are_null_in_json(tmp_path):
    logger = JsonLines()
    logger.start(RunInfo(RunDirectory(tmp_path), {}, -1))
    logger.log_metrics(1, 0, {"train/loss": float("nan"), "train/lr": 1.0})
    logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "epoch": 0, "train/loss": None, "train/lr": 1.0}


def test_values_that_are_not_finite_are_empty_cells_in_csv(tmp_path):
    logger = Csv()
    logger.start(RunInfo(RunDirectory(tmp_path), {}, -1))
    logger.log_metrics(1, 0, {"train/loss": float("nan"), "train/lr": 1.0})
    logger.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"step": "1", "epoch": "0", "train/loss": "", "train/lr": "1.0"}


class Recorder(BufferedLogger):
    """A service that keeps what it is sent."""

    name = "recorder"

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        self.sent: list[tuple[int, dict[str, float]]] = []
        return run_id or "1"

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.sent.append((step, dict(values)))


def test_a_value_of_a_step_that_was_sent_before_is_sent_once(tmp_path):
    """A run that stopped before its validation measures it when it goes on, at the same step."""
    logger = Recorder()
    for resumed_step, values in ((-1, {"train/loss": 1.0}), (3, {"valid/loss": 2.0})):
        logger.start(RunInfo(RunDirectory(tmp_path), {}, resumed_step))
        for _ in range(2):
            logger.log_metrics(3, 0, values)
            logger.flush()
        (record,) = logger.sent
        assert record[0] == 3 and values.items() <= record[1].items()


@pytest.mark.parametrize("changed", [False, True])
def test_changed_settings_begin_a_new_run_of_the_service(changed, tmp_path):
    """The run went to step 7 and is resumed at step 5; with other settings, 6 and 7 differ."""
    logger = Recorder()
    logger.start(RunInfo(RunDirectory(tmp_path), {}, -1))
    for step in (5, 6, 7):
        logger.log_metrics(step, 0, {"train/loss": 1.0})
    logger.close()
    logger.start(RunInfo(RunDirectory(tmp_path), {}, 5, changed))
    for step in (6, 7, 8):
        logger.log_metrics(step, 0, {"train/loss": 2.0})
    logger.close()
    assert [step for step, _ in logger.sent] == ([6, 7, 8] if changed else [8])
