"""Checkpoints, files and folders of a run."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosyexp.cli.compose import composed
from cosyexp.errors import UserError
from cosyexp.run import checkpoint as module
from cosyexp.run.checkpoint import META
from cosyexp.run.directory import CHANGEABLE, RunDirectory, flat, newest_run
from cosyexp.run.files import replace_file, write_text
from cosyexp.run.tensors import read_tensors
from tests.support import MODELS, config
from tests.unit.runs import add, cut, make_run, steps

INF, NAN = math.inf, math.nan


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def again(run):
    """The run as another process sees it."""
    return RunDirectory(run.path)


# checkpoints


def test_the_latest_checkpoint_is_the_newest_one(run):
    assert run.checkpoints.latest() is None
    for step in (5, 100, 20):
        add(run, step, {"loss": 1.0})
    latest = again(run).checkpoints.latest()
    assert (
        latest.step == 100
        and latest.losses == {"loss": 1.0}
        and set(latest.meta["sha256"]) == {"llm.safetensors"}
    )


@pytest.mark.parametrize("point", ["file_hash", "sync", "write_text"])
def test_an_interrupted_save_leaves_only_what_sweep_removes(run, monkeypatch, point):
    add(run, 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, point, interrupt)
    with pytest.raises(KeyboardInterrupt):
        add(run, 2)
    monkeypatch.undo()
    assert again(run).checkpoints.latest().step == 1
    again(run).checkpoints.remove_partial()
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_00000001"]


def change_a_byte(path):
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
def test_a_damaged_checkpoint_is_passed_over_aloud(run, said, name, damage):
    add(run, 1)
    damage(add(run, 2).path / name)
    assert again(run).checkpoints.latest().step == 1
    assert "step_00000002 is skipped" in said.text and name in said.text


def test_a_meta_that_is_cut_anywhere_stops_nobody(run):
    add(run, 1)
    path = add(run, 2, {"loss": 1.0}).path / META
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert again(run).checkpoints.latest().step in (1, 2), size


def test_no_sound_checkpoint_is_none(run):
    cut(add(run, 1).path / "llm.safetensors")
    assert again(run).checkpoints.latest() is None


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    add(run, 1, tensors={"weight": torch.zeros(3)}, ema={"weight": torch.zeros(3)})
    add(run, 1, {"loss": 2.0}, {"weight": torch.ones(3)})
    latest = again(run).checkpoints.latest()
    assert (
        latest.losses == {"loss": 2.0}
        and read_tensors(latest.path / "llm.safetensors")["weight"].sum() == 3
    )
    assert not (latest.path / "ema.safetensors").exists() and [
        path.name for path in latest.path.parent.iterdir()
    ] == [latest.path.name]


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
    again(run).checkpoints.prune(last, best)
    assert steps(run) == kept


def test_as_many_last_ones_stay_as_was_asked_for_while_they_come(run):
    for step in range(1, 11):
        add(run, step)
        run.checkpoints.prune(5, 0)
    assert steps(run) == [6, 7, 8, 9, 10]


def test_prune_never_takes_the_two_newest_sound_ones(run):
    for step in range(1, 7):
        add(run, step)
    for step in (6, 4):
        cut(run.path / "checkpoints" / f"step_{step:08d}" / "llm.safetensors")
    again(run).checkpoints.prune(1, 0)
    assert {3, 5} <= set(steps(run)) and not {1, 2} & set(steps(run))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_never_among_the_best(run, bad):
    for step, loss in enumerate([bad, 3.0, bad, 1.0, bad, 2.0, bad, bad], start=1):
        add(run, step, {"loss": loss})
    again(run).checkpoints.prune(0, 2)
    assert steps(run) == [4, 6, 7, 8]


def test_prune_can_go_by_another_metric(run):
    for step in range(1, 6):
        add(run, step, {"loss": 1.0, "mse": abs(step - 2.0)})
    again(run).checkpoints.prune(0, 1, metric="mse")
    assert steps(run) == [2, 4, 5]


# files


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


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    "key", ["optimizer.lr", "seed", "network.llm.blocks", "trainer.precision", "data.max_frames"]
)
def test_a_resume_may_not_change_what_is_learned(tmp_path, key):
    run = make_run(tmp_path, nested(key, 1))
    with pytest.raises(UserError, match=rf"{key}=1, not 2.*run_dir="):
        run.refuse_other({**run.config(), **nested(key, 2)})


def test_a_key_more_or_less_is_a_change(run):
    with pytest.raises(UserError, match="seed=None, not 3"):
        run.refuse_other({**run.config(), "seed": 3})
    with pytest.raises(UserError, match=r"model\.name=llm, not None"):
        run.refuse_other({})


FREE = [
    *(
        "run_dir",
        "init_from",
        "data.workers",
        "trainer.steps",
        "trainer.epochs",
        "trainer.accumulate",
        "trainer.log_every",
    ),
    *(
        "trainer.valid_every",
        "trainer.valid_epochs",
        "checkpoint.every",
        "checkpoint.keep_best",
        "engine.nproc_per_node",
        "engine.threads",
    ),
]


@pytest.mark.parametrize("key", [*FREE, *(pattern.replace("*", "any") for pattern in CHANGEABLE)])
def test_a_resume_may_change_where_and_how_long(tmp_path, key):
    run = make_run(tmp_path, nested(key, 1))
    run.refuse_other({**run.config(), **nested(key, "other")})


@pytest.mark.parametrize("model", MODELS)
def test_the_same_command_is_no_change(tmp_path, model):
    settings = config(
        model,
        Path("data"),
        f"run_dir={tmp_path}",
        "optimizer.lr=1e-5",
        "trainer.max_grad_norm=null",
    )
    run = make_run(tmp_path, settings)
    run.refuse_other(settings)


@pytest.mark.parametrize(
    "word",
    [
        "trainer.accumulate=4",
        "trainer.steps=9 trainer.valid_every=3",
        "engine.nproc_per_node=2 data.workers=1",
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_what_may_change_may_change_on_the_command_line(tmp_path, model, word):
    run = make_run(tmp_path, config(model, Path("data"), f"run_dir={tmp_path}"))
    run.refuse_other(config(model, Path("data"), f"run_dir={tmp_path}", *word.split()))


def test_every_changeable_pattern_is_a_key_of_some_config():
    configs = [config(model, Path("data"), "run_dir=x") for model in MODELS]
    configs += [
        composed("train", [f"family={family}", "model=llm"])
        for family in ("cosyvoice", "cosyvoice2")
    ]
    keys = [key for known in configs for key, _ in flat(known)]
    for pattern in CHANGEABLE:
        assert any(Path(key).match(pattern) for key in keys), pattern


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run directory"),
        *((text, "is not the YAML of a run") for text in (b"a: [", b"\xff\xfe\x00", b"", b"- 1")),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path, content, message):
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
