"""What a training would need: memory for each engine, and time, from steps that are thrown away.

Bytes of weights, gradients and optimizer state are counted. Activations are the tensors that the
forward passes of a step save for their backward passes, at most at a time. What a device holds
beside these, such as temporary results and the caches of its libraries, is not in the plan.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cosyexp.config import TrainConfig, engine_config
from cosyexp.registry import trust
from cosyexp.run.directory import RunDirectory
from cosyexp.run.logs import console
from cosyexp.training.build import assemble, base_of
from cosyexp.training.engines.blocks import repeated_blocks
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.launch import ranks_here
from cosyexp.training.nodes import check_nodes
from cosyexp.training.parameters import table
from cosyexp.training.trainer import Trainer

STEPS = 2  # that are timed, after one that is not
# engines, with what each shards over the ranks: weights, gradients, optimizer state
ENGINES = {
    "ddp": (False, False, False),
    "deepspeed engine.stage=0": (False, False, False),
    "deepspeed engine.stage=1": (False, False, True),
    "deepspeed engine.stage=2": (False, True, True),
    "deepspeed engine.stage=3": (True, True, True),
    "fsdp": (True, True, True),
}


def plan(config: TrainConfig) -> None:
    """Prints parameters, memory per engine and rank, steps per epoch and time of a training.

    Nothing is trained or written, apart from features of the data that are computed once.

    Raises:
        UserError: a setting or a file cannot be used.
    """
    trust(config.trusted)
    check_nodes(config)
    config.logger, config.callbacks, config.data.corpus = {}, {}, None
    if config.adapter:
        config.init_from = str(base_of(config))
    settings = engine_config(config.engine)
    with TemporaryDirectory() as folder, console():
        engine = DDP(
            precision=config.trainer.precision.value,
            max_grad_norm=config.trainer.max_grad_norm,
            ema=config.trainer.ema,
            running_sum=config.trainer.running_sum,
            activation_checkpointing=settings.activation_checkpointing,
        )
        trainer = assemble(config, RunDirectory(folder), engine)
        print(table(trainer.objective.trainables))
        trainer.setup()
        activations, seconds = _try_steps(trainer)
        ranks = ranks_here(settings)
        print(f"\nMB per rank, with {ranks} rank{'s' * (ranks > 1)}:")
        print("\n".join(memory(trainer, activations, ranks)))
        batches = trainer.loader.sampler.epoch(0, ranks * config.trainer.accumulate)
        epoch = -(-len(batches) // (ranks * config.trainer.accumulate))
        steps = config.trainer.steps or (config.trainer.epochs or 0) * epoch
        print(
            f"\n{epoch} steps per epoch, {seconds:.3g} s per step on this {engine.device.type}: "
            f"{_duration(epoch * seconds)} per epoch, {_duration(steps * seconds)} for {steps} "
            f"steps, without validation"
        )
        trainer.loader.close()
        engine.close()


def _try_steps(trainer: Trainer) -> tuple[int, float]:
    """Returns the bytes of the activations of a step, and the mean seconds of those after it."""
    meter = ActivationMeter(_tensors(trainer))
    with saved_tensors_hooks(meter.pack, lambda saved: saved.tensor):
        trainer.step(trainer.loader.next_step())
    began = time.perf_counter()
    for _ in range(STEPS):
        trainer.step(trainer.loader.next_step())
    trainer.nonfinite_guard.check(trainer.progress.step)  # waits for the device
    return meter.peak, (time.perf_counter() - began) / STEPS


def memory(trainer: Trainer, activations: int, ranks: int) -> Iterator[str]:
    """Yields the lines of the table of memory, with one for each engine that can train this.

    Args:
        trainer: after a step, on one rank.
        activations: their bytes.
        ranks: that an engine would shard over.
    """
    objective, engine = trainer.objective, trainer.engine
    modules = [trainable.module for trainable in objective.trainables.values()]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    weights, frozen = (
        _bytes(_tensors(trainer)),
        _bytes(_of(objective.frozen_modules) - _of(modules)),
    )
    weights += sum(_bytes(t for _, t in mean) for mean in engine.weight_averages().values())
    optimizer = _bytes(
        value
        for name in objective.trainables
        for entry in engine.optimizers[name].state.values()
        for value in entry.values()
    )
    gathered = sum(_gathered(module) for module in modules)
    titles = ("weights", "gradients", "optimizer", "activations", "all")
    yield f"{'engine':24}" + "".join(f"{title:>12}" for title in titles)
    for name, sharded in ENGINES.items():
        if name == "fsdp" and len(modules) > 1:
            continue
        whole = (weights, _bytes(trained), optimizer)
        parts = [
            size / ranks if shards else size for size, shards in zip(whole, sharded, strict=True)
        ]
        parts[0] += frozen + (gathered if sharded[0] and ranks > 1 else 0)
        sizes = (*parts, activations, sum(parts) + activations)
        yield f"{name:24}" + "".join(f"{size / 1e6:12.1f}" for size in sizes)


def _of(modules: Iterable[nn.Module]) -> set[Tensor]:
    return {tensor for m in modules for tensor in (*m.parameters(), *m.buffers())}


def _tensors(trainer: Trainer) -> set[Tensor]:
    """Returns the parameters and buffers of all trainables."""
    return _of(trainable.module for trainable in trainer.objective.trainables.values())


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _gathered(module: nn.Module) -> int:
    """Returns the bytes of sharded weights that are whole at a time: one block, and the rest."""
    blocks = [_of([block]) for block in repeated_blocks(module)]
    return _bytes(_of([module]).difference(*blocks)) + max(map(_bytes, blocks), default=0)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class ActivationMeter:
    """Counts the bytes of the tensors that autograd saves.

    Args:
        weights: tensors that do not count.

    Attributes:
        peak: the most bytes that were saved at a time.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self.users: Counter[int] = Counter()  # saved tensors of each storage
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> "SavedTensor":
        """Counts a tensor until its graph is freed."""
        return SavedTensor(tensor.detach(), self)

    def add(self, storage: torch.UntypedStorage, change: int) -> None:
        """Adds or removes a user of a storage."""
        key = storage.data_ptr()
        if key in self.weights:
            return
        before = self.users[key]
        self.users[key] += change
        if not before or not self.users[key]:
            self.live += change * storage.nbytes()
            self.peak = max(self.peak, self.live)


class SavedTensor:
    """A saved tensor, which counts in a meter while it exists."""

    def __init__(self, tensor: Tensor, meter: ActivationMeter) -> None:
        self.tensor, self.meter = tensor, meter
        meter.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.meter.add(self.tensor.untyped_storage(), -1)
