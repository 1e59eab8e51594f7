"""The base class of all engines: ranks, precision, optimizers, updates and weight averages."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cosyexp.distributed import init_distributed
from cosyexp.objectives.base import Trainable
from cosyexp.training.engines.base import StepReport
from cosyexp.training.engines.blocks import repeated_blocks
from cosyexp.training.engines.shards import load_shards
from cosyexp.training.weight_averages import make_weight_averages

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BaseEngine:
    """Implements all of `Engine` except `backward`, for ranks that hold full weights.

    Ranks communicate with NCCL between GPUs and with Gloo on CPUs. A subclass implements `backward`
    and sums the gradients over ranks before `BaseEngine._update` runs. It may also override

    - `_prepare_module` and `_finish_setup`, which run before and after an optimizer is made;
    - `_local_weights`, `_shard` and `_unshard`, if a rank holds only shards of the weights;
    - `_optimizer_state` and `_load_optimizer`, if a rank holds only shards of optimizer state;
    - `_scaler`, to use another loss scaler;
    - the class attributes `equal_batches` and `optimizer_layout`, see `Engine`, and `needs_group`,
      if it needs a process group even for a single process.

    Args:
        precision: "fp32", "bf16" or "fp16". The latter two keep the weights in fp32 and run the
            forward pass under autocast; fp16 also scales the loss.
        max_grad_norm: the norm to which all gradients of a trainable are clipped, or None.
        ema: decay of the exponential moving average of the last trainable's weights, or None.
        running_sum: keep the sum of the last trainable's weights.
        timeout: seconds after which a collective operation that does not return ends the run.
        compile: compile the repeated blocks of the networks with `torch.compile`.
        activation_checkpointing: recompute the activations of these blocks in the backward pass,
            which saves memory and takes time.
    """

    equal_batches = False
    optimizer_layout = "whole"
    needs_group = False

    def __init__(
        self,
        *,
        precision: str = "fp32",
        max_grad_norm: float | None = None,
        ema: float | None = None,
        running_sum: bool = False,
        timeout: float = 1800,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        self.rank, self.world, self.device, self.owns_group = init_distributed(
            timeout, self.needs_group
        )
        self.dtype, self.max_grad_norm = DTYPES[precision], max_grad_norm
        self.ema, self.running_sum = ema, running_sum
        self.compile, self.activation_checkpointing = compile, activation_checkpointing

    # --- networks ---

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        """Moves all networks to the device and makes optimizers, loss scalers and averages."""
        for module in frozen_modules:
            module.to(self.device)
        if self.compile:  # a discriminator per period, each with and without gradients
            torch._dynamo.config.recompile_limit = 64
        self.trainables, self.optimizers, self.scalers = dict(trainables), {}, {}
        for name, trainable in trainables.items():
            trainable.module.to(self.device)
            for block in repeated_blocks(trainable.module):
                if self.activation_checkpointing:
                    checkpoint(block)
                if self.compile:
                    # Sizes that differ between batches become dynamic with the second one. The
                    # length of a vocoder's segments does not, and its pads need a fixed one.
                    block.compile()
            self._prepare_module(name)
            optimizer = trainable.optimizer(trainable.parameters())
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"] * group.get("lr_scale", 1.0)
            self.optimizers[name] = optimizer
            self.scalers[name] = self._scaler()
            self._finish_setup(name)
        self.last = next(reversed(self.trainables))
        self.averages = make_weight_averages(
            self._local_weights(self.last), ema=self.ema, running_sum=self.running_sum
        )

    def _prepare_module(self, name: str) -> None:
        """Prepares the network of a trainable before its optimizer is made."""

    def _finish_setup(self, name: str) -> None:
        """Finishes the setup of a trainable after its optimizer is made."""

    def _scaler(self) -> torch.amp.GradScaler:
        """Makes the loss scaler of a trainable, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def _local_weights(self, name: str) -> dict[str, Tensor]:
        """Returns this rank's live weights of a trainable, full or sharded, by name."""
        return self.trainables[name].state_dict()

    def _shard(self, name: str, key: str, full: Tensor) -> Tensor:
        """Returns this rank's shard of the full weight `key` of a trainable."""
        return full

    def _unshard(self, name: str, key: str, shard: Tensor) -> Tensor:
        """Gathers the full weight `key` of a trainable from the shards of all ranks."""
        return shard

    # --- steps ---

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns torch's autocast to the engine's precision, or a null context for fp32."""
        return (
            nullcontext()
            if self.dtype is torch.float32
            else torch.autocast(self.device.type, self.dtype)
        )

    def step(self, name: str, update: int) -> StepReport:
        """Sets the learning rate, updates a trainable, and adds to the weight averages."""
        for group in self.optimizers[name].param_groups:
            group["lr"] = self.trainables[name].scheduler(update, group["base_lr"])
        norm, applied = self._update(name)
        for average in self.averages.values() if name == self.last else ():
            average.update(update + 1, applied)
        return StepReport(norm, applied)

    def _update(self, name: str) -> tuple[Tensor, Tensor]:
        """Clips and applies gradients that are already summed over ranks.

        Returns:
            Their norm before clipping, and whether it was finite, as tensors on the device.
        """
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        parameters = self._parameters(name)
        for parameter in parameters:
            # A parameter without a gradient was not used in this step, or not by this rank. It gets
            # zeros, so that its update does not depend on which ranks used it.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        scaler.unscale_(optimizer)
        norm = get_total_norm(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach()
        applied = torch.isfinite(norm)
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        update_or_skip(optimizer, applied)
        if scaler.is_enabled():
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def _parameters(self, name: str) -> list[nn.Parameter]:
        """Returns the trained parameters of a trainable, in the order of its optimizer."""
        return [
            parameter
            for group in self.optimizers[name].param_groups
            for parameter in group["params"]
        ]

    def learning_rate(self, name: str) -> float:
        """Returns the learning rate of a trainable's last update."""
        group = self.optimizers[name].param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    # --- communication ---

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of each value over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def all_gather(self, content: Any) -> list[Any]:
        """Returns what each rank passed, in the order of the ranks."""
        if self.world == 1:
            return [content]
        contents: list[Any] = [None] * self.world
        dist.all_gather_object(contents, content)
        return contents

    def close(self) -> None:
        """Destroys the process group, if this engine created it."""
        if self.owns_group:
            dist.destroy_process_group()

    # --- checkpoints ---

    def weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and full weights of a trainable, one tensor at a time."""
        for key, shard in self._local_weights(name).items():
            yield key, self._unshard(name, key, shard)

    def weight_averages(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        """Returns the averages of the last trainable's weights by name, each as `weights` does."""
        return {
            name: ((key, self._unshard(self.last, key, shard)) for key, shard in average.items())
            for name, average in self.averages.items()
        }

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Returns the state of optimizers and loss scalers on rank 0, and {} on other ranks."""
        optimizers = {name: self._optimizer_state(name, folder) for name in self.optimizers}
        if self.rank > 0:
            return {}
        return {
            "optimizers": optimizers,
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }

    def load(
        self,
        weights: Mapping[str, Mapping[str, Tensor]],
        means: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Restores weights, averages, optimizers and loss scalers from a checkpoint."""
        for name, tensors in weights.items():
            for key, own in self._local_weights(name).items():
                own.copy_(self._shard(name, key, tensors[key]))
            with self._own_options(name):
                self._load_optimizer(name, state["optimizers"][name], folder)
            self.scalers[name].load_state_dict(state["scalers"][name])
        self._load_averages(means)

    @contextmanager
    def _own_options(self, name: str) -> Iterator[None]:
        """Keeps the options of an optimizer, such as its base learning rate, in a load of state.

        They are those of the config, which a resume may change (`resume.change`).
        """
        options = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizers[name].param_groups
        ]
        yield
        for group, kept in zip(self.optimizers[name].param_groups, options, strict=True):
            group.update(kept)

    def _load_averages(self, means: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, tensors in means.items():
            self.averages[name].load(self._shard_all(self.last, tensors))

    def _shard_all(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._shard(name, key, full) for key, full in tensors.items()}

    def _optimizer_state(self, name: str, folder: Path) -> dict[str, Any]:
        """Returns the state of an optimizer, whose tensors may be written to `folder / name`."""
        return self.optimizers[name].state_dict()

    def _load_optimizer(self, name: str, state: Mapping[str, Any], folder: Path) -> None:
        """Restores the state of a trainable's optimizer, full or written in shards by FSDP."""
        if (folder / name).exists():
            state = load_shards(folder / name, state, self._parameters(name))
        self.optimizers[name].load_state_dict(dict(state))


def update_or_skip(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Steps an optimizer if `applied` is True.

    A fused optimizer checks this on the device, so the host does not wait for it.

    Args:
        optimizer: the optimizer.
        applied: a boolean on the device, whether the gradients are finite.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif applied.item():
        optimizer.step()
