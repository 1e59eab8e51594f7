"""Short trainings in memory, that must come out the same however their work is divided.

Every check takes a planted fault, so that it can be shown to fail.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from cosyexp.data.dataset import Dataset
from cosyexp.data.loader import MicroBatch
from cosyexp.run.directory import RunDirectory
from cosyexp.training import session
from cosyexp.training.launch import launch
from cosyexp.training.meters import means
from cosyexp.training.trainer import Trainer
from tests.support import config, no_dropout

STEPS = {"llm": 10, "flow": 10, "hifigan": 5}
Fault = Callable[[], AbstractContextManager[Any]]


@dataclass
class Trajectory:
    """losses: of each step and trainable. norms: of its gradients. weights: at the end, of each trainable."""

    losses: list[dict[str, float]]
    norms: list[dict[str, float]]
    weights: dict[str, dict[str, np.ndarray]]


def trainer_of(settings: dict[str, Any], double: bool) -> Trainer:
    """What `session.run` would train, placed but not started."""
    engine = session._engine(settings)
    trainer = session._trainer(
        settings, engine, RunDirectory(settings["run_dir"]), *session.datasets_of(settings, engine)
    )
    if double:
        for module in [
            *(trainable.module for trainable in trainer.objective.trainables.values()),
            *trainer.objective.frozen_modules,
        ]:
            module.double()
    engine.setup(trainer.objective.trainables, trainer.objective.frozen_modules)
    return trainer


def step(trainer: Trainer, micro_batches: list[MicroBatch], found: Trajectory) -> None:
    trainer._forget()
    trainer.step(micro_batches)
    states = trainer._gathered()
    found.losses.append(
        {name: means([state["loss"]], state["units"])["loss"] for name, state in states.items()}
    )
    found.norms.append({name: state["norm"] for name, state in states.items()})


def finish(trainer: Trainer, found: Trajectory) -> Trajectory:
    found.weights = {
        name: {key: value.numpy().copy() for key, value in trainer.engine.weights(name)}
        for name in trainer.objective.trainables
    }
    trainer.engine.close()
    return found


@contextmanager
def in_double() -> Iterator[None]:
    """Batches in fp64."""
    make = Dataset.batch
    with patch.object(Dataset, "batch", lambda self, rows, draws: make(self, rows, draws).double()):
        yield


def _by_plan(settings: dict[str, Any]) -> Trajectory:
    """As many steps of the plan as the model's number; runs in every rank."""
    torch.set_num_threads(1)
    double, fault = settings.pop("double"), settings.pop("fault")
    with in_double() if double else nullcontext(), fault() if fault else nullcontext():
        trainer, found = trainer_of(settings, double), Trajectory([], [], {})
        for _ in range(STEPS[trainer.model]):
            step(trainer, trainer.loader.next_step(), found)
        return finish(trainer, found)


def by_plans(config: dict[str, Any]) -> dict[str, Trajectory]:
    """Several trainings, one after the other, in the same ranks; `runs` are their settings by name."""
    alone: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )  # type: ignore[attr-defined]
    dist.init_process_group("gloo", **alone)
    return {name: _by_plan(dict(settings)) for name, settings in config["runs"].items()}


def by_plan(
    model: str,
    data: Path,
    *words: str,
    ranks: int,
    accumulate: int,
    double: bool = True,
    fault: Fault | None = None,
) -> Trajectory:
    """A training as the plan has it, over some ranks."""
    words = (
        f"engine.nproc_per_node={ranks}",
        f"trainer.accumulate={accumulate}",
        f"run_dir={data}/unused",
        *words,
    )
    return launch(_by_plan, {**config(model, data, *words), "double": double, "fault": fault})


def by_rows(
    model: str,
    data: Path,
    rows: list[list[int]],
    *words: str,
    double: bool = True,
    fault: Fault | None = None,
    steps: int | None = None,
) -> Trajectory:
    """A training in which every step has the micro-batches `rows`, without dropout, with new draws at each step."""
    from cosyexp.data.draws import Draws

    settings = config(
        model,
        data,
        *no_dropout(model),
        f"trainer.accumulate={len(rows)}",
        f"run_dir={data}/unused",
        *words,
    )
    with in_double() if double else nullcontext(), fault() if fault else nullcontext():
        trainer, found = trainer_of(settings, double), Trajectory([], [], {})
        for number in range(steps or STEPS[model]):
            dataset = trainer.loader.dataset
            step(
                trainer,
                [
                    MicroBatch(i, dataset.batch(part, Draws(0, number)))
                    for i, part in enumerate(rows)
                ],
                found,
            )
        return finish(trainer, found)


def assert_same(one: Trajectory, two: Trajectory, double: bool = True) -> None:
    """The same losses, gradient norms and weights; in fp32 to rounding, without drift to one side; and every trainable learns."""
    for name in one.weights:
        ours, theirs = ([found[name] for found in trajectory.losses] for trajectory in (one, two))
        residuals = [(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        assert max(map(abs, residuals)) < (1e-9 if double else 1e-5), (name, residuals)
        assert abs(sum(residuals) / len(residuals)) < (1e-10 if double else 3e-6), (name, residuals)
        ours, theirs = ([found[name] for found in trajectory.norms] for trajectory in (one, two))
        assert all(norm > 0 for norm in [*ours, *theirs]), (name, "does not learn")
        assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < (
            1e-8 if double else 1e-3
        ), (name, ours, theirs)
        whole, other = (
            np.concatenate([w.ravel() for w in found.weights[name].values()])
            for found in (one, two)
        )
        if double:
            assert np.abs(whole - other).max() < 1e-9, (name, np.abs(whole - other).max())
        norms = np.linalg.norm(whole - other), np.linalg.norm(whole)
        assert norms[0] / norms[1] < (1e-9 if double else 1e-4), (name, norms)
