"""Shards weights, gradients and optimizer state over the ranks with torch's FSDP2."""

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
from cosyexp.registry import register
from cosyexp.training.engines.blocks import repeated_blocks
from cosyexp.training.engines.common import DTYPES, BaseEngine
from cosyexp.training.engines.shards import save_shards


@register("engine")
class FSDP(BaseEngine):
    """Fully sharded data parallelism (Zhao et al. 2023, "PyTorch FSDP"), for one trainable.

    The weights of each repeated block are gathered for its forward and backward pass, and all other
    weights for the whole passes.

    Args:
        param_dtype: precision of gathered weights, "fp32" or "bf16". bf16 halves their memory and
            communication, but also rounds weights that autocast would use in fp32.
        reshard_after_forward: free the gathered weights of a block between its forward and its
            backward pass, which saves memory and takes time.
        options: see `BaseEngine`.

    Raises:
        UserError: `param_dtype` is unknown, or lower than the precision.
    """

    equal_batches = True
    needs_group = True

    def __init__(
        self, *, param_dtype: str = "fp32", reshard_after_forward: bool = True, **options: Any
    ) -> None:
        if param_dtype not in ("fp32", "bf16"):
            raise UserError(f"engine.param_dtype={param_dtype} is not supported: give fp32 or bf16")
        if param_dtype == "bf16" and options.get("precision") == "fp32":
            raise UserError(
                "engine.param_dtype=bf16 needs half precision: give trainer.precision=bf16"
            )
        # harmless, as no code here changes the output of a module in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
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
        """Shards the network, moves it to the device and makes its optimizer.

        Raises:
            UserError: there is more than one trainable.
        """
        if len(trainables) > 1:
            raise UserError(
                f"engine=fsdp trains one network, not {' and '.join(trainables)}: give engine=ddp "
                f"or engine=deepspeed"
            )
        super().setup(trainables, frozen_modules)

    def _prepare_module(self, name: str) -> None:
        module = self.trainables[name].module
        for block in repeated_blocks(module):
            fully_shard(block, **self.sharding)
        fully_shard(module, **self.sharding)
        self.shards[name] = self._local_weights(name)

    def _scaler(self) -> torch.amp.GradScaler:
        return ShardedGradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        """Adds the gradients of a loss, summed over ranks and sharded."""
        self.scalers[name].scale(loss * self.world).backward()  # FSDP averages over ranks

    def _shard(self, name: str, key: str, full: Tensor) -> Tensor:
        return shard_like(self.shards[name][key], full)

    def _unshard(self, name: str, key: str, shard: Tensor) -> Tensor:
        return shard.full_tensor() if isinstance(shard, DTensor) else shard

    def _optimizer_state(self, name: str, folder: Path) -> dict[str, Any]:
        return save_shards(folder / name, super()._optimizer_state(name, folder))

    def _load_optimizer(self, name: str, state: Mapping[str, Any], folder: Path) -> None:
        # Without a folder, the state is that of another engine, with full tensors.
        if not (folder / name).exists():
            parameters = self._parameters(name)
            sharded = {i: shards_like(parameters[i], entry) for i, entry in state["state"].items()}
            state = {**state, "state": sharded}
        super()._load_optimizer(name, state, folder)


def shards_like(part: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Shards an optimizer's state of one parameter in the same way as the parameter.

    Args:
        part: the parameter, of which this rank holds a shard.
        entry: the full state of the parameter, such as its moments and step count.
    """
    return {
        key: shard_like(part, value) if isinstance(value, Tensor) and value.dim() else value
        for key, value in entry.items()
    }


def shard_like(part: Tensor, whole: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor that every rank holds in full.

    Args:
        part: a tensor that is sharded in the desired way; if it is not sharded, `whole` is
            returned.
        whole: the full tensor.
    """
    if not isinstance(part, DTensor):
        return whole
    return distribute_tensor(
        whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None
    )
