"""Ranks, validation, and precisions."""

import multiprocessing
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from cosyexp.errors import UserError
from cosyexp.training.launch import launch
from cosyexp.training.signals import SIGNALS
from tests.invariants.trajectory import Trajectory, step, trainer_of
from tests.support import MODELS, ROOT, config, environment
from tests.unit import ranks

TWO = {"engine": {"nproc_per_node": 2, "timeout": 3}}


# launch


def test_one_process_is_no_launch():
    here = object()
    assert launch(lambda _: here, {"engine": {"nproc_per_node": 1}}) is here


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (ranks.refuse, "rank 1 has no shoes: buy some"),
        (ranks.die, "rank 1 was ended by SIGKILL, as the system does when memory runs out"),
        (
            ranks.crash,
            "rank 1 failed with AssertionError: a bug of ours; its traceback stands above",
        ),
        (ranks.crash_beside_a_waiting_rank, "rank 1 failed with AssertionError: a bug of ours"),
        (ranks.hang, "rank 0 waited 3 s in vain for another rank"),
        (ranks.never_start, "rank 0 waited 3 s in vain for another rank"),
    ],
)
def test_what_ends_one_rank_ends_the_run_with_its_reason(work, message, capfd):
    handlers, began = [signal.getsignal(number) for number in SIGNALS], time.monotonic()
    with pytest.raises(UserError, match=message):
        launch(work, TWO)
    assert time.monotonic() - began < ranks.LONG / 3
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    said = capfd.readouterr().err
    assert (
        said.count("Traceback")
        == said.count('AssertionError("a bug of ours")')
        == said.count("rank 1 failed:")
        == ("bug" in message)
    )
    assert multiprocessing.active_children() == []


def test_a_preemption_is_heard_by_every_rank_and_kills_none(capfd):
    assert launch(ranks.listen, TWO) is True
    assert capfd.readouterr().err == ""


def test_a_signal_before_the_ranks_listen_means_what_it_means_to_the_whole_run():
    came = []
    previous = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with pytest.raises(UserError, match="ended by SIGTERM"):  # where the handler returns
            launch(ranks.do_not_listen, TWO)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert came == [1]


def test_torchrun_names_the_rank_that_failed():
    words = [
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.unit.ranks",
        "crash_beside_a_waiting_rank",
    ]
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    summary = said.stderr.split("Root Cause (first observed failure):")[1]
    assert said.returncode == 1
    assert "rank      : 1 " in summary and "AssertionError: a bug of ours" in summary


def test_the_outcome_is_rank_0_s_however_large_it_is():
    word, much = launch(ranks.give_much, {**TWO, "word": "rank "})
    assert word == "rank 02" and much == bytes(ranks.LARGE)


# validation


def settings(model, data, tmp_path, *words):
    return config(model, data, f"run_dir={tmp_path}", *words)


@pytest.fixture(params=MODELS)
def trainer(request, data, tmp_path):
    return trainer_of(settings(request.param, data, tmp_path), double=False)


def test_validating_twice_measures_the_same(trainer):
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert trainer.validate()
        losses.append(trainer.progress.losses)
    assert losses[0] == losses[1] and all(torch.isfinite(torch.tensor(list(losses[0].values()))))


def test_validation_leaves_training_as_it_was(request, trainer, data, tmp_path):
    other, found = trainer_of(settings(trainer.model, data, tmp_path), double=False), []
    for each, validates in ((trainer, True), (other, False)):
        trajectory = Trajectory([], [], {})
        step(each, each.loader.next_step(), trajectory)
        if validates:
            each.validate()
            assert all(
                trainable.module.training for trainable in each.objective.trainables.values()
            )
        step(each, each.loader.next_step(), trajectory)
        found.append((trajectory.losses, trajectory.norms))
    assert found[0] == found[1]


BUDGETS = {
    "llm": 700,
    "flow": 700,
    "hifigan": 24,
}  # of frames, such that there are several micro-batches


def free_ports(count):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def test_two_ranks_validate_as_one(data, tmp_path):
    models = {
        model: settings(model, data, tmp_path, f"data.max_frames={budget}")
        for model, budget in BUDGETS.items()
    }
    work = {**TWO, "models": models, "ports": free_ports(len(models))}
    one, two = ranks.validate(work), launch(ranks.validate, work)
    assert one == two and set(one) == set(BUDGETS)


# precision


def steps_of(model, data, tmp_path, precision):
    """The losses of two updates, and the trainer."""
    trainer = trainer_of(
        settings(model, data, tmp_path, f"trainer.precision={precision}"), double=False
    )
    losses = []
    for number in range(2):
        micro_batches = trainer.loader.next_step()
        while trainer.progress.step == number:  # fp16 may have to find its scale
            trajectory = Trajectory([], [], {})
            step(trainer, micro_batches, trajectory)
        losses.append(trajectory.losses[0])
    return losses, trainer


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_trains_like_fp32_and_keeps_fp32_weights(model, data, tmp_path):
    wanted, _ = steps_of(model, data, tmp_path, "fp32")
    for precision in ("bf16", "fp16"):
        found, trainer = steps_of(model, data, tmp_path, precision)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours != theirs, "computes in fp32"
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=0.05), (precision, name)
        for name, trainable in trainer.objective.trainables.items():
            assert {parameter.dtype for parameter in trainable.module.parameters()} == {
                torch.float32
            }
            assert all(torch.isfinite(weight).all() for _, weight in trainer.engine.weights(name))
