"""The overhead of the generic trainer over a bare loop that computes the same, on the demo models.

Usage: python benchmarks/training_step.py [steps]

It prints ratios of times. The two loops alternate, so that a busy machine slows down both alike.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cosyexp.cli.compose import compose_train
from cosyexp.data.loader import MicroBatch
from cosyexp.run.directory import RunDirectory
from cosyexp.training.build import assemble, build_engine
from cosyexp.training.trainer import Trainer

ROUNDS = 5
Step = Callable[[Trainer, Sequence[MicroBatch]], object]


def make_trainer(model: str, folder: str) -> Trainer:
    """Returns a trainer of a demo model, in memory."""
    config = compose_train([f"model={model}", f"run_dir={folder}"])
    trainer = assemble(config, RunDirectory(folder), build_engine(config))
    trainer.setup()
    return trainer


def bare_step(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> None:
    """Takes a step as a script would: forward, backward, clip, update.

    It has no weighting by units, no check for values that are not finite, no metrics and no keyed
    dropout.
    """
    (micro,) = micro_batches
    counts = trainer.objective.count_units(micro.batch)
    units = {unit: float(count) for unit, count in counts.items()}
    losses = trainer.objective.losses(micro.batch)
    for (name, trainable), loss in zip(trainer.objective.trainables.items(), losses, strict=True):
        loss.scaled(units).backward()
        max_grad_norm = trainer.config.max_grad_norm or 1e9
        torch.nn.utils.clip_grad_norm_(trainable.module.parameters(), max_grad_norm)
        optimizer = trainer.engine.optimizers[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bare_step_with_two_forwards(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> None:
    """Runs the generator once for each of the two losses, as many GAN scripts do."""
    objective: Any = trainer.objective  # Adversarial
    objective.reuse_forward = False
    bare_step(trainer, micro_batches)
    objective.reuse_forward = True


def milliseconds(step: Step, trainer: Trainer, blocks: Sequence[Sequence[MicroBatch]]) -> float:
    """Returns the mean time of a step over all blocks of micro-batches."""
    start = time.perf_counter()
    for block in blocks:
        step(trainer, block)
    return 1000 * (time.perf_counter() - start) / len(blocks)


def print_row(
    name: str, trainer: Trainer, blocks: Sequence[Sequence[MicroBatch]], loop: Step
) -> None:
    """Compares the trainer with a loop, in alternating rounds."""
    times = [
        (milliseconds(loop, trainer, blocks), milliseconds(Trainer.step, trainer, blocks))
        for _ in range(ROUNDS)
    ]
    shortest = min(ours for _, ours in times)
    ratio = statistics.median(ours / theirs for theirs, ours in times)
    print(f"{name:38} {shortest:10.1f} {ratio:15.3f}", flush=True)


def main() -> None:
    """Prints the table."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    torch.set_num_threads(1)
    print(f"{'model':38} {'ms per step':>11} {'trainer : loop':>15}")
    with tempfile.TemporaryDirectory() as folder:
        for model in ("llm", "flow", "hifigan"):
            trainer = make_trainer(model, f"{folder}/{model}")
            blocks = [trainer.loader.next_step() for _ in range(steps)]
            bare_step(trainer, blocks[0])
            print_row(model, trainer, blocks, bare_step)
        print_row(
            "hifigan, a generator run for each loss", trainer, blocks, bare_step_with_two_forwards
        )


if __name__ == "__main__":
    main()
