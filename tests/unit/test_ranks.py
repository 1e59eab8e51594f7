"""Starting ranks, and what they validate and train."""

import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cosyexp.config import EngineConfig, TrainConfig
from cosyexp.data.loader import MicroBatch
from cosyexp.errors import UserError
from cosyexp.training.launch import launch
from cosyexp.training.meters import Meter, means
from cosyexp.training.signals import SIGNALS
from cosyexp.training.trainer import Trainer
from tests.support import MODELS, ROOT, config, environment, free_ports
from tests.unit import ranks

ONE, TWO = (EngineConfig(nproc_per_node=n, timeout=ranks.TIMEOUT) for n in (1, 2))


# launch


def test_one_process_is_not_started():
    job = object()
    assert launch(lambda given: given, job, ONE) is job


@pytest.mark.parametrize(
    ("wanted", "gpus", "started"), [("auto", 0, None), (1, 0, None), ("auto", 3, 3), (2, 3, 2)]
)
def test_nproc_per_node_is_the_number_of_started_processes(monkeypatch, wanted, gpus, started):
    """auto: one per GPU, and one on a machine without; one process is this one."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        "cosyexp.training.launch._start",
        lambda work, job, processes, timeout: calls.append((job, processes, timeout)),
    )
    result = launch(lambda job: f"here: {job}", "job", EngineConfig(wanted, timeout=7))
    assert (result, calls) == (
        ("here: job", []) if started is None else (None, [("job", started, 7)])
    )


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"engine\.nproc_per_node=3 must be <= 2, the GPUs"):
        launch(lambda job: job, None, EngineConfig(nproc_per_node=3))


def test_a_launcher_takes_precedence_over_nproc_per_node(monkeypatch):
    """A process that torchrun started is one rank, whatever the config says."""
    exits: list[object] = []
    monkeypatch.setattr("cosyexp.training.launch.atexit.register", exits.append)
    for name, value in {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cosyexp.training.launch._start", None)
    assert launch(lambda job: f"rank of {job}", "run", TWO) == "rank of run" and len(exits) == 1


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (ranks.raise_user_error, "^rank 1 has no shoes: buy some$"),
        (ranks.die, "rank 1 was ended by SIGKILL, as the system does when memory runs out"),
        (
            ranks.crash,
            "rank 1 failed with AssertionError: a bug of ours; see its traceback above",
        ),
        (ranks.crash_while_another_waits, "rank 1 failed with AssertionError: a bug of ours"),
        (ranks.hang, "rank 0 timed out after waiting 3 s for another rank"),
        (ranks.never_start, "rank 0 timed out after waiting 3 s for another rank"),
    ],
)
def test_a_failed_rank_ends_the_run_with_its_reason(work, message, capfd):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(UserError, match=message):
        launch(work, None, TWO)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    printed = capfd.readouterr().err
    assert (
        printed.count("Traceback")
        == printed.count('AssertionError("a bug of ours")')
        == printed.count("rank 1 failed:")
        == ("bug" in message)
    )
    assert "nobody ended this rank" not in printed
    assert multiprocessing.active_children() == []


def test_every_rank_notices_a_preemption_and_none_is_killed(capfd):
    assert launch(ranks.stop_on_preemption, None, TWO) is True
    assert capfd.readouterr().err == ""


def test_a_signal_that_ranks_do_not_handle_yet_ends_the_run():
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        # the handler of this process returns, so that launch goes on
        with pytest.raises(UserError, match=r"rank [01] was ended by SIGTERM: repeat the command"):
            launch(ranks.terminate_the_launcher, None, TWO)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [1]


def test_torchrun_names_the_rank_that_failed():
    words = [
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.unit.ranks",
        "crash_while_another_waits",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    summary = result.stderr.split("Root Cause (first observed failure):")[1]
    assert result.returncode == 1
    assert "rank      : 1 " in summary and "AssertionError: a bug of ours" in summary


def test_the_result_is_that_of_rank_0_however_large_it_is():
    word, much = launch(ranks.return_much, "rank ", TWO)
    assert word == "rank 02" and much == bytes(ranks.LARGE)


# validation


def small(model: str, data: Path, run_dir: Path, *words: str) -> TrainConfig:
    """Returns the config of a tiny network."""
    return config(model, data, f"run_dir={run_dir}", *words)


@pytest.fixture(params=MODELS)
def trainer(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Trainer:
    """A trainer that has not made a step."""
    return ranks.trainer_of(small(request.param, data, tmp_path))


def measured_step(
    trainer: Trainer, micro_batches: Sequence[MicroBatch]
) -> dict[str, tuple[float, float]]:
    """Makes a step, and returns loss and gradient norm of every trainable."""
    trainer.sums = {name: Meter() for name in trainer.sums}
    trainer.step(micro_batches)
    states = {name: sums.state_dict() for name, sums in trainer.sums.items()}
    return {
        name: (means([state["loss"]], state["units"])["loss"], state["norm"])
        for name, state in states.items()
        if state["updates"]
    }


def test_validating_twice_measures_the_same(trainer):
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert trainer.validate()
        losses.append(trainer.progress.losses)
    assert losses[0] == losses[1] and all(torch.isfinite(torch.tensor(list(losses[0].values()))))


def test_validation_leaves_training_as_it_was(trainer, data, tmp_path):
    other, found = ranks.trainer_of(small(trainer.model, data, tmp_path)), []
    for each, validates in ((trainer, True), (other, False)):
        first = measured_step(each, each.loader.next_step())
        if validates:
            each.validate()
            assert all(
                trainable.module.training for trainable in each.objective.trainables.values()
            )
        found.append((first, measured_step(each, each.loader.next_step())))
    assert found[0] == found[1] and found[0][0] != found[0][1]


# of frames, such that there are several micro-batches
BUDGETS = {"llm": 700, "flow": 700, "hifigan": 24}


def test_two_ranks_validate_as_one(data, tmp_path):
    configs = {
        model: small(model, data, tmp_path, f"data.max_frames={budget}")
        for model, budget in BUDGETS.items()
    }
    job = ranks.Validations(configs, free_ports(len(configs)))
    one, two = ranks.validate(job), launch(ranks.validate, job, TWO)
    assert one == two and set(one) == set(BUDGETS)


# precision


def losses_of_two_updates(
    model: str, data: Path, run_dir: Path, precision: str
) -> tuple[list[dict[str, float]], Trainer]:
    """Returns the losses of each update by trainable, and the trainer."""
    trainer = ranks.trainer_of(small(model, data, run_dir, f"trainer.precision={precision}"))
    losses = []
    for number in range(2):
        micro_batches = trainer.loader.next_step()
        found: dict[str, float] = {}
        while trainer.progress.step == number:  # fp16 may have to find its scale
            measured = measured_step(trainer, micro_batches)
            found |= {name: loss for name, (loss, _) in measured.items() if name not in found}
        losses.append(found)
    return losses, trainer


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_trains_like_fp32_and_keeps_fp32_weights(model, data, tmp_path):
    wanted, _ = losses_of_two_updates(model, data, tmp_path, "fp32")
    for precision in ("bf16", "fp16"):
        found, trainer = losses_of_two_updates(model, data, tmp_path, precision)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours != theirs, "computes in fp32"
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=0.05), (precision, name)
        for name, trainable in trainer.objective.trainables.items():
            assert {parameter.dtype for parameter in trainable.module.parameters()} == {
                torch.float32
            }
            assert all(torch.isfinite(weight).all() for _, weight in trainer.engine.weights(name))
