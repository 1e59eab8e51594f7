"""Short trainings in memory, to compare trainings whose work is divided differently.

Each takes an optional planted fault of `faults.py`, which the comparison must detect.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from cosyexp.config import TrainConfig
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import Draws
from cosyexp.data.loader import MicroBatch
from cosyexp.run.directory import RunDirectory
from cosyexp.training.build import assemble, build_engine
from cosyexp.training.meters import Meter, means, merged
from cosyexp.training.trainer import Trainer
from tests.support import config, no_dropout

Name = TypeVar("Name")
Fault = Callable[[], AbstractContextManager[Any]]
STEPS = {"llm": 10, "flow": 10, "hifigan": 5}


class Training(NamedTuple):
    """A training to run. double: in fp64. fault: planted in it."""

    config: TrainConfig
    double: bool
    fault: Fault | None


@dataclass
class Trajectory:
    """The losses and gradient norms of each step, and the weights at the end, per trainable."""

    losses: list[dict[str, float]]
    norms: list[dict[str, float]]
    weights: dict[str, dict[str, np.ndarray]]


def by_rows(
    model: str,
    data: Path,
    rows: Sequence[Sequence[int]],
    *words: str,
    double: bool = True,
    fault: Fault | None = None,
) -> Trajectory:
    """Trains on the micro-batches `rows` in every step, without dropout.

    Args:
        model: llm, flow or hifigan.
        data: prepared data.
        rows: of each micro-batch, the indices of its utterances.
        words: overrides of the config.
        double: train in fp64.
        fault: planted in the training.
    """
    accumulate = f"trainer.accumulate={len(rows)}"
    words = (*no_dropout(model), accumulate, f"run_dir={data}/unused", *words)
    training = Training(config(model, data, *words), double, fault)

    def micro_batches(trainer: Trainer, step: int) -> list[MicroBatch]:
        draws = Draws(0, step)
        parts = enumerate(rows)
        return [MicroBatch(i, trainer.loader.dataset.batch(part, draws)) for i, part in parts]

    return _train(training, micro_batches)


def by_plans(trainings: Mapping[Name, Training]) -> dict[Name, Trajectory]:
    """Trains on the batches of the sampler, for one training after the other in the same ranks."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.set_num_threads(1)
    return {
        name: _train(training, lambda trainer, _: trainer.loader.next_step())
        for name, training in trainings.items()
    }


def _train(
    training: Training, micro_batches: Callable[[Trainer, int], Sequence[MicroBatch]]
) -> Trajectory:
    with _in_double() if training.double else nullcontext(), (training.fault or nullcontext)():
        config = training.config
        trainer = assemble(config, RunDirectory(config.run_dir), build_engine(config))
        objective = trainer.objective
        if training.double:
            modules = [trainable.module for trainable in objective.trainables.values()]
            for module in [*modules, *objective.frozen_modules]:
                module.double()
        trainer.setup()
        trajectory = Trajectory([], [], {})
        for number in range(STEPS[trainer.model]):
            _step(trainer, micro_batches(trainer, number), trajectory)
        trajectory.weights = {
            name: {key: value.numpy().copy() for key, value in trainer.engine.weights(name)}
            for name in objective.trainables
        }
        trainer.engine.close()
        return trajectory


def _step(trainer: Trainer, micro_batches: Sequence[MicroBatch], trajectory: Trajectory) -> None:
    """Takes a step, and adds its losses and gradient norms over all ranks to a trajectory."""
    trainer.sums = {name: Meter() for name in trainer.objective.trainables}
    trainer.step(micro_batches)
    own = {name: meter.state_dict() for name, meter in trainer.sums.items()}
    ranks = trainer.engine.all_gather(own)
    states = {name: merged([rank[name] for rank in ranks]) for name in own}
    trajectory.losses.append(
        {name: means([state["loss"]], state["units"])["loss"] for name, state in states.items()}
    )
    trajectory.norms.append({name: state["norm"] for name, state in states.items()})


@contextmanager
def _in_double() -> Iterator[None]:
    """Makes batches in fp64."""
    batch = Dataset.batch

    def double(self: Dataset, rows: Sequence[int], draws: Draws) -> Any:
        return batch(self, rows, draws).double()

    with patch.object(Dataset, "batch", double):
        yield


def assert_same(one: Trajectory, two: Trajectory, double: bool = True) -> None:
    """Asserts the same losses, gradient norms and weights, and that every trainable learns.

    In fp32 they are the same up to rounding, and the losses do not drift to one side. The message
    begins with what differs, such as "losses of llm differ".
    """
    for name in one.weights:
        ours, theirs = ([losses[name] for losses in each.losses] for each in (one, two))
        residuals = [(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        limit = 1e-9 if double else 1e-5
        assert all(abs(r) < limit for r in residuals), f"losses of {name} differ: {residuals}"
        mean = sum(residuals) / len(residuals)
        assert abs(mean) < (1e-10 if double else 3e-6), f"losses of {name} drift: {residuals}"

        ours, theirs = ([norms[name] for norms in each.norms] for each in (one, two))
        assert all(norm > 0 for norm in [*ours, *theirs]), f"{name} does not learn"
        assert_same_norms(one, two, name, 1e-8 if double else 1e-3)

        whole, other = (
            np.concatenate([weight.ravel() for weight in each.weights[name].values()])
            for each in (one, two)
        )
        largest = np.abs(whole - other).max()
        relative = np.linalg.norm(whole - other) / np.linalg.norm(whole)
        message = f"weights of {name} differ: by up to {largest}, {relative} of their norm"
        assert not double or largest < 1e-9, message
        assert relative < (1e-9 if double else 1e-4), message


def assert_same_norms(one: Trajectory, two: Trajectory, name: str, limit: float) -> None:
    """Asserts that the gradient norms of a trainable differ by less than `limit`, relatively."""
    pairs = [(a[name], b[name]) for a, b in zip(one.norms, two.norms, strict=True)]
    assert all(abs(a / b - 1) < limit for a, b in pairs), f"norms of {name} differ: {pairs}"
