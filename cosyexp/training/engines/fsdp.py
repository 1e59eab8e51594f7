"""Weights, gradients and optimizer state lie in shards, one on each rank: torch's FSDP2 (Zhao et al. 2023)."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, distribute_tensor

from cosyexp.errors import UserError
from cosyexp.objectives.base import Trainable
from cosyexp.training.engines.blocks import repeated_blocks
from cosyexp.training.engines.common import DTYPES, BaseEngine
from cosyexp.training.engines.shards import save_shards


class FSDP(BaseEngine):
    """Each repeated block of the network is gathered for its forward and for its backward, the rest for the whole of them.

    param_dtype: precision of gathered weights; "bf16" halves their memory and traffic, and rounds what autocast would leave in fp32.
    reshard_after_forward: free the gathered weights of a block between forward and backward: less memory, more time.
    """

    equal_batches = True
    needs_group = True

    def __init__(
        self, *, param_dtype: str = "fp32", reshard_after_forward: bool = True, **options: Any
    ) -> None:
        if param_dtype not in ("fp32", "bf16"):
            raise UserError(f"engine.param_dtype={param_dtype} is neither fp32 nor bf16")
        warnings.filterwarnings(
            "ignore", "FSDP2-wrapped module .* returned a view"
        )  # which nothing here changes in place
        super().__init__(**options)
        self.sharding: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.world,)),
            "reshard_after_forward": reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES[param_dtype],
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
        }
        self.shards: dict[str, dict[str, Tensor]] = {}

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        if len(trainables) > 1:
            raise UserError(
                f"engine=fsdp trains one network, not {' and '.join(trainables)}: give engine=ddp or engine=deepspeed"
            )
        super().setup(trainables, frozen_modules)

    def _prepare(self, name: str) -> None:
        module = self.trainables[name].module
        for block in repeated_blocks(module):
            fully_shard(block, **self.sharding)
        fully_shard(module, **self.sharding)
        self.shards[name] = self._parts(name)

    def _scaler(self) -> torch.amp.GradScaler:
        return ShardedGradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        self.scalers[name].scale(loss * self.world).backward()  # FSDP takes the mean over ranks

    def _part(self, name: str, key: str, whole: Tensor) -> Tensor:
        return shard_like(self.shards[name][key], whole)

    def _whole(self, name: str, key: str, part: Tensor) -> Tensor:
        return part.full_tensor() if isinstance(part, DTensor) else part

    def _optimizer_state(self, name: str, folder: Path) -> dict[str, Any]:
        return save_shards(folder / name, super()._optimizer_state(name, folder))

    def _load_optimizer(self, name: str, state: Mapping[str, Any], folder: Path) -> None:
        if not (folder / name).exists():  # whole, of another engine
            parts = {
                i: shards_like(self._trained(name)[i], entry) for i, entry in state["state"].items()
            }
            state = {**state, "state": parts}
        super()._load_optimizer(name, state, folder)


def shards_like(part: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, of which this rank has a part."""
    return {
        key: shard_like(part, value) if isinstance(value, Tensor) and value.dim() else value
        for key, value in entry.items()
    }


def shard_like(part: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole."""
    if not isinstance(part, DTensor):
        return whole
    return distribute_tensor(
        whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None
    )
