"""What the generic trainer costs over a bare loop of the same mathematics, on the demo models.

    python benchmarks/training_step.py [steps]

Prints ratios of times within this run: the two loops take turns, so that a noisy machine disturbs both alike.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.data.loader import MicroBatch
from cosyexp.run.directory import RunDirectory
from cosyexp.training import session
from cosyexp.training.trainer import Trainer

ROUNDS = 5


def trainer_of(model: str, folder: str) -> Trainer:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR.resolve())):
        config: Any = OmegaConf.to_container(
            compose("train", [f"model={model}", f"run_dir={folder}"]),
            resolve=True,
            enum_to_str=True,
        )
    engine = session._engine(config)
    trainer = session._trainer(
        config, engine, RunDirectory(folder), *session.datasets_of(config, engine)
    )
    engine.setup(trainer.objective.trainables, trainer.objective.frozen_modules)
    return trainer


def bare_step(trainer: Trainer, micro_batches: list[MicroBatch]) -> None:
    """What a script would do: forward, backward, max_grad_norm, update; no sums, no watch, no metrics, no keyed dropout."""
    (micro,) = micro_batches
    units = {
        unit: float(count) for unit, count in trainer.objective.count_units(micro.batch).items()
    }
    for (name, trainable), loss in zip(
        trainer.objective.trainables.items(), trainer.objective.losses(micro.batch), strict=True
    ):
        loss.scaled(units).backward()
        torch.nn.utils.clip_grad_norm_(
            trainable.module.parameters(), trainer.options.max_grad_norm or 1e9
        )
        optimizer = trainer.engine.optimizers[name]  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def milliseconds(
    step: Callable[[Trainer, list[MicroBatch]], None],
    trainer: Trainer,
    blocks: list[list[MicroBatch]],
) -> float:
    """Of a step, on average."""
    began = time.perf_counter()
    for block in blocks:
        step(trainer, block)
    return 1000 * (time.perf_counter() - began) / len(blocks)


def twice_forward(trainer: Trainer, micro_batches: list[MicroBatch]) -> None:
    """The generator's forward done once for each trainable's turn, as GAN scripts do."""
    trainer.objective.reuse_forward = False  # type: ignore[attr-defined]
    bare_step(trainer, micro_batches)
    trainer.objective.reuse_forward = True  # type: ignore[attr-defined]


def row(
    name: str,
    trainer: Trainer,
    blocks: list[list[MicroBatch]],
    plain: Callable[[Trainer, list[MicroBatch]], None],
) -> None:
    times = [
        (milliseconds(plain, trainer, blocks), milliseconds(Trainer.step, trainer, blocks))
        for _ in range(ROUNDS)
    ]
    shortest, ratio = (
        min(ours for _, ours in times),
        statistics.median(ours / theirs for theirs, ours in times),
    )
    print(f"{name:38} {shortest:10.1f} {ratio:15.3f}", flush=True)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f"{'model':38} {'ms a step':>10} {'trainer : loop':>15}")
    with tempfile.TemporaryDirectory() as folder:
        for model in ("llm", "flow", "hifigan"):
            trainer = trainer_of(model, f"{folder}/{model}")
            blocks = [trainer.loader.next_step() for _ in range(steps)]
            bare_step(trainer, blocks[0])
            row(model, trainer, blocks, bare_step)
        row("hifigan, loop with a forward each turn", trainer, blocks, twice_forward)


if __name__ == "__main__":
    main()
