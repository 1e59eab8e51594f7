"""Checkpoints, files and folders of a run."""

import json
import math
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig, to_dict
from cosyexp.errors import UserError
from cosyexp.run import checkpoint as module
from cosyexp.run.checkpoint import BY_LOSS, META, Checkpoint, Criterion, KeepBest
from cosyexp.run.directory import CHANGEABLE, RunDirectory, flat, newest_run
from cosyexp.run.files import replace_file, write_json, write_text
from cosyexp.run.tensors import read_tensors
from tests.support import MODELS, config
from tests.unit.runs import add, cut, make_run, smallest_config, steps

INF, NAN = math.inf, math.nan


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run without checkpoints."""
    return make_run(tmp_path / "run")


def again(run: RunDirectory) -> RunDirectory:
    """Returns the run as another process sees it."""
    return RunDirectory(run.path)


def latest_of(run: RunDirectory) -> Checkpoint:
    """Returns the newest intact checkpoint, as another process sees it."""
    found = again(run).checkpoints.latest()
    assert found is not None
    return found


# checkpoints


def test_the_latest_checkpoint_is_the_newest_one(run):
    assert run.checkpoints.latest() is None
    for step in (5, 100, 20):
        add(run, step, {"loss": 1.0})
    latest = latest_of(run)
    assert (
        latest.step == 100
        and latest.losses == {"loss": 1.0}
        and set(latest.meta["sha256"]) == {"llm.safetensors"}
    )


@pytest.mark.parametrize("point", ["file_hash", "sync", "write_yaml"])
def test_an_interrupted_save_leaves_only_what_the_next_start_removes(run, monkeypatch, point):
    add(run, 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, point, interrupt)
    with pytest.raises(KeyboardInterrupt):
        add(run, 2)
    monkeypatch.undo()
    assert latest_of(run).step == 1
    again(run).checkpoints.remove_partial()
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_00000001"]


def change_a_byte(path: Path) -> None:
    """Flips a bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("llm.safetensors", cut),
        ("llm.safetensors", change_a_byte),
        ("llm.safetensors", Path.unlink),
        (META, Path.unlink),
        (META, lambda path: path.write_bytes(b"\xff\xfe\x00")),
        (META, lambda path: path.write_text("step: [1")),
        (META, lambda path: path.write_text("")),
        (META, lambda path: path.write_text("step: 2\n")),
        (META, lambda path: path.write_text("step: 2\nsha256:\n")),
    ],
    ids=[
        "cut",
        "changed",
        "missing",
        "no meta",
        "binary meta",
        "bad meta",
        "empty meta",
        "meta without hashes",
        "meta with empty hashes",
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(run, said, name, damage):
    add(run, 1)
    damage(add(run, 2).path / name)
    assert latest_of(run).step == 1
    assert "step_00000002 is skipped" in said.text and name in said.text


def test_a_meta_that_is_cut_anywhere_stops_no_start(run):
    add(run, 1)
    path = add(run, 2, {"loss": 1.0}).path / META
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert latest_of(run).step in (1, 2), size


def test_without_an_intact_checkpoint_there_is_no_latest(run):
    cut(add(run, 1).path / "llm.safetensors")
    assert again(run).checkpoints.latest() is None


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    add(run, 1, tensors={"weight": torch.zeros(3)}, ema={"weight": torch.zeros(3)})
    add(run, 1, {"loss": 2.0}, {"weight": torch.ones(3)})
    latest = latest_of(run)
    assert (
        latest.losses == {"loss": 2.0}
        and read_tensors(latest.path / "llm.safetensors")["weight"].sum() == 3
    )
    assert not (latest.path / "ema.safetensors").exists() and [
        path.name for path in latest.path.parent.iterdir()
    ] == [latest.path.name]


def best_by_loss(num: int) -> list[KeepBest]:
    """Returns the rule that keeps some of the best by their loss."""
    return [KeepBest(BY_LOSS, num)]


@pytest.mark.parametrize(
    ("last", "best", "kept"),
    [
        (3, 0, [4, 5, 6]),
        (2, 2, [1, 3, 5, 6]),
        (0, 0, [5, 6]),
        (0, 1, [3, 5, 6]),
        (1, 6, [1, 2, 3, 4, 5, 6]),
        (5, 0, [2, 3, 4, 5, 6]),
        (7, 0, [1, 2, 3, 4, 5, 6]),
        (11, 0, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_prune_keeps_the_last_and_the_best(run, last, best, kept):
    for step, loss in enumerate([2.0, 4.0, 1.0, 5.0, 6.0, 7.0], start=1):
        add(run, step, {"loss": loss})
    again(run).checkpoints.prune(last, best_by_loss(best))
    assert steps(run) == kept


def test_the_last_ones_stay_while_more_are_added(run):
    for step in range(1, 11):
        add(run, step)
        run.checkpoints.prune(5, [])
    assert steps(run) == [6, 7, 8, 9, 10]


def test_prune_never_removes_the_two_newest_intact_ones(run):
    for step in range(1, 7):
        add(run, step)
    for step in (6, 4):
        cut(run.path / "checkpoints" / f"step_{step:08d}" / "llm.safetensors")
    again(run).checkpoints.prune(1, best_by_loss(0))
    assert {3, 5} <= set(steps(run)) and not {1, 2} & set(steps(run))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_never_among_the_best(run, bad):
    for step, loss in enumerate([bad, 3.0, bad, 1.0, bad, 2.0, bad, bad], start=1):
        add(run, step, {"loss": loss})
    again(run).checkpoints.prune(0, best_by_loss(2))
    assert steps(run) == [4, 6, 7, 8]


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 4, 5]), ("max", [4, 5, 1])])
def test_prune_can_keep_the_best_by_another_metric(run, mode, kept):
    for step, mse in enumerate([9.0, 0.0, 1.0, 2.0, 3.0], start=1):
        add(run, step, {"loss": 1.0, "mse": mse})
    again(run).checkpoints.prune(0, [KeepBest(Criterion("mse", mode), 1)])
    assert steps(run) == sorted(kept)


def test_several_rules_keep_what_each_of_them_keeps(run):
    losses = [(1.0, 5.0), (2.0, 6.0), (3.0, 9.0), (4.0, 7.0), (5.0, 8.0), (6.0, 8.5)]
    for step, (loss, acc) in enumerate(losses, start=1):
        add(run, step, {"loss": loss, "acc": acc})
    again(run).checkpoints.prune(0, [*best_by_loss(1), KeepBest(Criterion("acc", "max"), 1)])
    assert steps(run) == [1, 3, 5, 6]


# files


def test_what_is_not_finite_is_null_in_every_file(tmp_path):
    bad = {"nan": math.nan, "list": [math.inf, (-math.inf, 1.0)], "good": 2, "text": "nan"}
    wanted = {"nan": None, "list": [None, [None, 1.0]], "good": 2, "text": "nan"}
    write_json(tmp_path / "a.json", bad)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == wanted
    run = make_run(tmp_path / "run")
    add(run, 1, {"loss": math.nan, "mse": math.inf, "acc": 0.5})
    assert "nan" not in (run.checkpoints.folder / "step_00000001/meta.yaml").read_text()
    (checkpoint,) = run.checkpoints.all()
    assert checkpoint.losses == {"acc": 0.5}


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replace_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_there_until_it_is_whole(tmp_path):
    with replace_file(tmp_path / "folder" / "a.txt") as file:
        file.write(b"half")
        assert not (tmp_path / "folder" / "a.txt").exists()
    assert (tmp_path / "folder" / "a.txt").read_bytes() == b"half"


# run directories


def nested(key: str, value: Any) -> dict[str, Any]:
    """Returns a nested mapping with one leaf, of the path `key`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def config_with(key: str, value: Any) -> TrainConfig:
    """Returns the smallest config with one value, which replaces a whole node of free keys."""
    return smallest_config(nested(key, value))


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("optimizer.lr", 1, 2),
        ("seed", 1, 2),
        ("network.llm.blocks", 1, 2),
        ("trainer.precision", "fp32", "bf16"),
        ("data.max_frames", 1, 2),
        ("family.mel.hop", 256, 128),
        ("trainer.ema", None, 0.5),
    ],
)
def test_a_resume_may_not_change_what_is_learned(tmp_path, key, before, now):
    run = make_run(tmp_path, config_with(key, before))
    with pytest.raises(UserError, match=rf"{key}={before}, not {now}.*run_dir="):
        run.refuse_other(config_with(key, now))


def test_a_key_more_or_less_is_a_change(tmp_path):
    more, less = config_with("optimizer.lr", 3), smallest_config()
    with pytest.raises(UserError, match=r"begun with optimizer=\{\}, not None"):
        make_run(tmp_path, less).refuse_other(more)
    with pytest.raises(UserError, match=r"begun with optimizer=None, not \{\}"):
        make_run(tmp_path, more).refuse_other(less)
    with pytest.raises(UserError, match=r"optimizer\.eps=None, not 1"):
        make_run(tmp_path, more).refuse_other(smallest_config({"optimizer": {"lr": 3, "eps": 1}}))


def test_another_model_is_named_before_all_else(tmp_path):
    run = make_run(tmp_path, config("llm", Path("data"), f"run_dir={tmp_path}"))
    with pytest.raises(UserError, match=r"begun with model\.name=llm, not flow"):
        run.refuse_other(config("flow", Path("data"), f"run_dir={tmp_path}"))


# two values of each key that a resume may change
FREE: dict[str, tuple[Any, Any]] = {
    "run_dir": ("a", "b"),
    "init_from": (None, "b"),
    "init_strict": (True, False),
    "init_extra": ("mean", "normal"),
    "data.dir": (None, "b"),
    "data.train": ("a", ["b", "c"]),
    "data.valid": (None, "b"),
    "data.speakers": (None, "b"),
    "data.workers": (0, 2),
    "data.processes": (1, 2),
    "family.tokenizer.folder": ("a", "b"),
    "family.tokenizer.vocabulary": ("a", "b"),
    "objective.accumulate": (1, 2),
    "trainer.steps": (1, 2),
    "trainer.epochs": (None, 2),
    "trainer.accumulate": (1, 2),
    "trainer.log_every": (1, 2),
    "trainer.valid_every": (1, 2),
    "trainer.valid_epochs": (1, 2),
    "trainer.previews": (1, 2),
    "trainer.on_nonfinite": ("stop", "skip"),
    "checkpoint.every": (1, 2),
    "checkpoint.keep_last": (1, 2),
    "checkpoint.keep_best": (1, 2),
    "engine.nproc_per_node": ("auto", 2),
    "engine.threads": (None, 2),
    "engine.stage": (1, 2),
    "logger.jsonl": ("a", "b"),
    "callbacks.mine": ("a", "b"),
    "metrics.mine": ("a", "b"),
    # a node with and without keys
    "logger": ({}, {"jsonl": "a"}),
    "callbacks": ({}, {"mine": "a"}),
    "metrics": ({"mine": "a"}, {}),
}


@pytest.mark.parametrize("key", FREE)
def test_a_resume_may_change_where_and_how_long(tmp_path, key):
    before, now = FREE[key]
    first, second = config_with(key, before), config_with(key, now)
    assert first != second
    make_run(tmp_path, first).refuse_other(second)


def test_every_changeable_pattern_is_tried():
    for pattern in CHANGEABLE:
        assert any(fnmatch(key, pattern) for key in FREE), pattern


@pytest.mark.parametrize("model", MODELS)
def test_the_same_command_is_no_change(tmp_path, model):
    words = [f"run_dir={tmp_path}", "optimizer.lr=1e-5", "trainer.max_grad_norm=null"]
    run = make_run(tmp_path, config(model, Path("data"), *words))
    run.refuse_other(config(model, Path("data"), *words))
    assert run.config() == config(model, Path("data"), *words)


@pytest.mark.parametrize(
    "word",
    [
        "trainer.accumulate=4",
        "trainer.steps=9 trainer.valid_every=3",
        "engine.nproc_per_node=2 data.workers=1",
        "engine=fsdp logger=csv callbacks=throughput metrics=none",
        "callbacks=[early_stopping,best_checkpoint] logger=[jsonl,csv]",
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_what_may_change_may_change_on_the_command_line(tmp_path, model, word):
    run = make_run(tmp_path, config(model, Path("data"), f"run_dir={tmp_path}"))
    run.refuse_other(config(model, Path("data"), f"run_dir={tmp_path}", *word.split()))


def test_callbacks_loggers_and_metrics_may_be_removed_by_a_resume(tmp_path):
    words = ["callbacks=throughput", "metrics=top5", "logger=[jsonl,csv]"]
    run = make_run(tmp_path, config("llm", Path("data"), f"run_dir={tmp_path}", *words))
    run.refuse_other(config("llm", Path("data"), f"run_dir={tmp_path}"))


def test_every_changeable_pattern_is_a_key_of_some_config():
    extras = ["callbacks=throughput", "run_dir=x"]
    configs = [config(model, Path("data"), *extras) for model in MODELS]
    configs.append(config("llm", Path("data"), *extras, "metrics=top5"))
    configs += [
        compose_train([f"family={family}", "model=llm"]) for family in ("cosyvoice", "cosyvoice2")
    ]
    keys = [key for known in configs for key, _ in flat(to_dict(known))]
    for pattern in CHANGEABLE:
        assert any(fnmatch(key, pattern) for key in keys), pattern


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run directory"),
        *((text, "is not the YAML of a run") for text in (b"a: [", b"\xff\xfe\x00", b"", b"- 1")),
    ],
)
def test_a_folder_that_is_not_a_run_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        RunDirectory(tmp_path).config()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_run_is_trained_by_one_process(run):
    held = run.lock()
    with pytest.raises(UserError, match="another process is training in"):
        again(run).lock()
    script = f"from cosyexp.run.directory import RunDirectory; RunDirectory({str(run)!r}).lock()"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        other.returncode != 0 and "another process is training in" in other.stderr.splitlines()[-1]
    )
    held.close()
    again(run).lock().close()


def test_the_newest_run_is_the_one_that_saved_last(tmp_path):
    for name, time in (("demo/llm", 1000), ("demo/flow", 3000), ("hifigan", 2000)):
        add(make_run(tmp_path / name), 1)
        os.utime(tmp_path / name / "checkpoints", (time, time))
    make_run(tmp_path / "without_checkpoints")
    assert newest_run(str(tmp_path)).path == tmp_path / "demo/flow"
    with pytest.raises(UserError, match="there is no run under"):
        newest_run(str(tmp_path / "nowhere"))
