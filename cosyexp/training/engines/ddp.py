"""Every rank holds the whole model; gradients are summed over ranks. One process is plain training, with no process group."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cosyexp.objectives.base import Player
from cosyexp.training.ema import means_of
from cosyexp.training.engines.base import StepReport
from cosyexp.training.ranks import join

BUCKET = 25 * 2**20  # bytes of gradients that travel together
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DDP:
    """Gloo on CPU, NCCL on CUDA.

    torch's own wrapper is not used: with several micro-batches of several players in lockstep it silently reduces the wrong
    gradients. Here they are summed explicitly, once a step.

    precision: "fp32"; "bf16" and "fp16" keep fp32 weights and run the forward under autocast, fp16 with loss scaling.
    clip: largest norm of all gradients of a player, or None. ema, running_sum: of the last player's weights, see `means_of`.
    timeout: seconds after which a collective that does not come back ends the run.
    """

    def __init__(
        self,
        *,
        precision: str = "fp32",
        clip: float | None = None,
        ema: float | None = None,
        running_sum: bool = False,
        timeout: float = 1800,
    ) -> None:
        self.rank, self.world, self.device = join(timeout)
        self.dtype, self.clip, self.ema, self.running_sum = DTYPES[precision], clip, ema, running_sum

    def place(self, players: Mapping[str, Player], helpers: Sequence[nn.Module]) -> None:
        for helper in helpers:
            helper.to(self.device)
        self.players, self.optimizers, self.scalers = dict(players), {}, {}
        for name, player in players.items():
            player.module.to(self.device)
            parameters = [parameter for parameter in player.module.parameters() if parameter.requires_grad]
            self.optimizers[name] = player.optimizer(parameters)
            for group in self.optimizers[name].param_groups:
                group["base_lr"] = group["lr"]
            scaling = self.dtype is torch.float16
            self.scalers[name] = torch.amp.GradScaler(self.device.type, enabled=scaling)
        self.last = next(reversed(self.players))
        self.kept = means_of(self.players[self.last].module, ema=self.ema, running_sum=self.running_sum)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)

    def backward(self, name: str, loss: Tensor) -> None:
        self.scalers[name].scale(loss).backward()

    def step(self, name: str, update: int) -> StepReport:
        player, optimizer, scaler = self.players[name], self.optimizers[name], self.scalers[name]
        for group in optimizer.param_groups:
            group["lr"] = player.scheduler(update, group["base_lr"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # unused by this rank or in this step: the same update wherever it is unused
                parameter.grad = torch.zeros_like(parameter)
        self._reduce([parameter.grad for parameter in parameters])
        scaler.unscale_(optimizer)
        norm = get_total_norm([parameter.grad for parameter in parameters])
        applied = torch.isfinite(norm)
        if self.clip is not None:
            clip_grads_with_norm_(parameters, self.clip, norm)
        update_or_skip(optimizer, applied)
        if scaler.is_enabled():
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        for mean in self.kept.values() if name == self.last else ():
            mean.update(update + 1, applied)
        return StepReport(norm.detach(), applied)

    def _reduce(self, gradients: list[Tensor]) -> None:
        if self.world == 1:
            return
        for bucket in buckets(gradients, BUCKET):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def sum(self, values: Sequence[float]) -> list[float]:
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def gather(self, content: Any) -> list[Any]:
        if self.world == 1:
            return [content]
        contents: list[Any] = [None] * self.world
        dist.all_gather_object(contents, content)
        return contents

    def learning_rate(self, name: str) -> float:
        return float(self.optimizers[name].param_groups[0]["lr"])

    def weights(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield from self.players[name].module.state_dict().items()

    def means(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        return {name: mean.items() for name, mean in self.kept.items()}

    def state_dict(self) -> dict[str, Any]:
        if self.rank > 0:
            return {}
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }

    def load(
        self, weights: Mapping[str, Mapping[str, Tensor]], means: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        for name, tensors in weights.items():
            self.players[name].module.load_state_dict(tensors)
            self.optimizers[name].load_state_dict(state["optimizers"][name])
            self.scalers[name].load_state_dict(state["scalers"][name])
        for name, tensors in means.items():
            self.kept[name].load(tensors)

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def update_or_skip(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Steps an optimizer unless its gradients are not finite; a fused one decides on the device, without the host waiting."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~applied).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif applied.item():
        optimizer.step()


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together of about `size` bytes; the same on every rank."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + tensor.nbytes > size):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
