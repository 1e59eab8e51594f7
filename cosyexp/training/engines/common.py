"""What the engines have in common: ranks, precision, optimizers, learning rates, an update, and the running mean of the weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """One process of one or several: Gloo on CPU, NCCL on CUDA.

    precision: "fp32"; "bf16" and "fp16" keep fp32 weights and run the forward under autocast, fp16 with loss scaling.
    max_grad_norm: largest norm of all gradients of a trainable, or None. ema, running_sum: of the last trainable, see `make_weight_averages`.
    timeout: seconds after which a collective that does not come back ends the run.
    compile: the repeated blocks of the networks. activation_checkpointing: their activations in the backward, instead of keeping them.

    An engine that keeps weights in parts says so in `_parts`, `_part` and `_whole`.
    """

    equal_batches = False
    optimizer_layout = "whole"
    needs_group = False  # a process group also for one process

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
        self.dtype, self.max_grad_norm, self.ema, self.running_sum = (
            DTYPES[precision],
            max_grad_norm,
            ema,
            running_sum,
        )
        self.compile, self.activation_checkpointing = compile, activation_checkpointing

    # the networks ---------------------------------------------------------------------------------------------------

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        for module in frozen_modules:
            module.to(self.device)
        self.trainables, self.optimizers, self.scalers = dict(trainables), {}, {}
        for name, trainable in trainables.items():
            trainable.module.to(self.device)
            for block in repeated_blocks(trainable.module):
                if self.activation_checkpointing:
                    checkpoint(block)
                if self.compile:
                    block.compile(dynamic=True)  # lengths differ from batch to batch
            self._prepare(name)
            optimizer = trainable.optimizer(
                [
                    parameter
                    for parameter in trainable.module.parameters()
                    if parameter.requires_grad
                ]
            )
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
            self.optimizers[name] = optimizer
            self.scalers[name] = self._scaler()
            self._placed(name)
        self.last = next(reversed(self.trainables))
        self.averages = make_weight_averages(
            self._parts(self.last), ema=self.ema, running_sum=self.running_sum
        )

    def _prepare(self, name: str) -> None:
        """What an engine does to a network before its optimizer is made."""

    def _placed(self, name: str) -> None:
        """What an engine does after a trainable's optimizer is made."""

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def _parts(self, name: str) -> dict[str, Tensor]:
        """What this rank holds of each of a trainable's weights; changes with them."""
        return self.trainables[name].module.state_dict()

    def _part(self, name: str, key: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole weight."""
        return whole

    def _whole(self, name: str, key: str, part: Tensor) -> Tensor:
        """The weight of which every rank gives its part."""
        return part

    # a step ---------------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        return (
            nullcontext()
            if self.dtype is torch.float32
            else torch.autocast(self.device.type, self.dtype)
        )

    def step(self, name: str, update: int) -> StepReport:
        for group in self.optimizers[name].param_groups:
            group["lr"] = self.trainables[name].scheduler(update, group["base_lr"])
        norm, applied = self._update(name)
        for mean in self.averages.values() if name == self.last else ():
            mean.update(update + 1, applied)
        return StepReport(norm, applied)

    def _update(self, name: str) -> tuple[Tensor, Tensor]:
        """Clips and applies gradients that are summed over ranks already; the norm before, and whether it was finite."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        parameters = self._trained(name)
        for parameter in parameters:
            if (
                parameter.grad is None
            ):  # unused by this rank or in this step: the same update wherever it is unused
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

    def _trained(self, name: str) -> list[nn.Parameter]:
        return [
            parameter
            for group in self.optimizers[name].param_groups
            for parameter in group["params"]
        ]

    def learning_rate(self, name: str) -> float:
        return float(self.optimizers[name].param_groups[0]["lr"])

    # the ranks ------------------------------------------------------------------------------------------------------

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def all_gather(self, content: Any) -> list[Any]:
        if self.world == 1:
            return [content]
        contents: list[Any] = [None] * self.world
        dist.all_gather_object(contents, content)
        return contents

    def close(self) -> None:
        if self.owns_group:
            dist.destroy_process_group()

    # a checkpoint ---------------------------------------------------------------------------------------------------

    def weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        for key, part in self._parts(name).items():
            yield key, self._whole(name, key, part)

    def weight_averages(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        return {
            name: ((key, self._whole(self.last, key, part)) for key, part in mean.items())
            for name, mean in self.averages.items()
        }

    def save_state(self, folder: Path) -> dict[str, Any]:
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
        for name, tensors in weights.items():
            self.trainables[name].module.load_state_dict(self._parts_of(name, tensors))
            self._load_optimizer(name, state["optimizers"][name], folder)
            self.scalers[name].load_state_dict(state["scalers"][name])
        self._load_means(means)

    def _load_means(self, means: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, tensors in means.items():
            self.averages[name].load(self._parts_of(self.last, tensors))

    def _parts_of(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._part(name, key, whole) for key, whole in tensors.items()}

    def _optimizer_state(self, name: str, folder: Path) -> dict[str, Any]:
        return self.optimizers[name].state_dict()

    def _load_optimizer(self, name: str, state: Mapping[str, Any], folder: Path) -> None:
        in_parts = (folder / name).exists()
        whole = load_shards(folder / name, state, self._trained(name)) if in_parts else dict(state)
        self.optimizers[name].load_state_dict(whole)


def update_or_skip(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Steps an optimizer unless its gradients are not finite; a fused one decides on the device, without the host waiting."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~applied).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif applied.item():
        optimizer.step()
