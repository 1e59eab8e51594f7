"""Shards optimizer state, gradients and weights over the ranks with DeepSpeed's ZeRO."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosyexp.arguments import Range
from cosyexp.errors import UserError
from cosyexp.objectives.base import Trainable
from cosyexp.registry import register
from cosyexp.run.directory import flat
from cosyexp.run.documents import read_json
from cosyexp.training.engines.common import BaseEngine

log = logging.getLogger(__name__)

# keys of a DeepSpeed JSON that the config of the run determines instead, and how to set them there
OURS = {
    "optimizer": "optimizer=",
    "scheduler": "scheduler=",
    "gradient_clipping": "trainer.max_grad_norm",
    "gradient_accumulation_steps": "trainer.accumulate",
    "train_batch_size": "data.max_frames",
    "train_micro_batch_size_per_gpu": "data.max_frames",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "torch_autocast": "trainer.precision",
}

Stage = Annotated[int, Range(ge=0, le=3)]


@register("engine")
class DeepSpeed(BaseEngine):
    """Sharding with DeepSpeed (Rajbhandari et al. 2020, "ZeRO"), with one engine per trainable.

    Precision, gradient accumulation and schedules work as in the other engines. DeepSpeed itself
    keeps fp32 weights and is not aware of the accumulation: each loss is already the share of its
    micro-batch in the step, computed under torch's autocast. A trainable is called as a plain
    module, not through its DeepSpeed engine; hooks on the module gather sharded weights.

    Args:
        stage: stage of ZeRO: 1 shards the optimizer state, 2 also the gradients, 3 also the
            weights; 0 shards nothing.
        offload_optimizer: keep the optimizer state in the host's memory.
        offload_weights: keep the weights in the host's memory; only with stage 3.
        ds_config: path of a DeepSpeed JSON, for settings that have no key in the config of the run.
        options: see `BaseEngine`.

    Raises:
        UserError: `stage` is unknown, DeepSpeed is not installed, or the JSON is not readable.
    """

    equal_batches = True
    needs_group = True

    def __init__(
        self,
        *,
        stage: Stage = 2,
        offload_optimizer: bool = False,
        offload_weights: bool = False,
        ds_config: str | None = None,
        **options: Any,
    ) -> None:
        self.deepspeed = import_deepspeed()
        zero: dict[str, Any] = {"stage": stage}
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload_weights:
            zero["offload_param"] = {"device": "cpu"}
        self.config: dict[str, Any] = {
            # required, but nothing depends on it
            "train_micro_batch_size_per_gpu": 1,
            # without this key DeepSpeed would clip to 1
            "gradient_clipping": options.get("max_grad_norm") or 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        self.changes = ""
        if ds_config is not None:
            self.config, self.changes = overridden(self.config, Path(ds_config))
        self.stage = self.config["zero_optimization"]["stage"]
        if self.stage not in range(4):
            raise UserError(f"ZeRO has no stage {self.stage}: give engine.stage=0, 1, 2 or 3")
        super().__init__(**options)
        self.optimizer_layout = (
            f"in DeepSpeed's shards of stage {self.stage} on {self.world} ranks"
            if self.stage
            else "whole"
        )
        self.engines: dict[str, Any] = {}
        self.sharded: dict[str, dict[str, Any]] = {}  # parameters of stage 3, for each trainable

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        """Moves all networks to the device and makes optimizers and DeepSpeed engines."""
        if self.changes:
            log.info(self.changes)
        super().setup(trainables, frozen_modules)

    def _finish_setup(self, name: str) -> None:
        module = self.trainables[name].module
        try:
            self.engines[name], *_ = self.deepspeed.initialize(
                model=module,
                optimizer=self.optimizers[name],
                config=self.config,
                dist_init_required=False,
            )
        except ValueError as error:  # raised for an invalid config
            reason = " ".join(str(error).split())
            raise UserError(
                f"DeepSpeed rejects engine.ds_config= or another key of engine: {reason}"
            ) from None
        if self.stage and self.dtype is torch.float16:
            self.engines[name].optimizer.loss_scaler = loss_scaler()
        named = module.named_parameters(remove_duplicate=False)
        self.sharded[name] = {
            key: parameter for key, parameter in named if hasattr(parameter, "ds_tensor")
        }

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        """Adds the gradients of a loss, summed over ranks and sharded."""
        engine = self.engines[name]
        engine.set_gradient_accumulation_boundary(last)
        if self.stage:
            # Otherwise stage 3 treats this backward pass as the first of the step, since no forward
            # pass goes through the DeepSpeed engine.
            engine.optimizer.clear_backward_seen_flag()
        scaled = loss if self.stage else self.scalers[name].scale(loss)
        engine.backward(scaled * self.world)  # DeepSpeed averages over ranks

    def _update(self, name: str) -> tuple[Tensor, Tensor]:
        if self.stage == 0:
            return super()._update(name)
        engine = self.engines[name]
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=self.device)
        return norm, torch.as_tensor(not engine.optimizer.overflow, device=self.device)

    def close(self) -> None:
        """Destroys the process group, if this engine created it."""
        # DeepSpeed's function also forgets its own groups, for the next run in this process.
        if self.owns_group:
            self.deepspeed.comm.destroy_process_group()

    # --- checkpoints ---

    def _local_weights(self, name: str) -> dict[str, Tensor]:
        sharded = self.sharded[name]
        return {
            key: sharded[key].ds_tensor if key in sharded else tensor
            for key, tensor in super()._local_weights(name).items()
        }

    def _shard(self, name: str, key: str, full: Tensor) -> Tensor:
        parameter = self.sharded[name].get(key)
        if parameter is None:
            return full
        size = parameter.ds_tensor.numel()
        own = full.flatten()[self.rank * size : (self.rank + 1) * size]
        return torch.nn.functional.pad(own, (0, size - own.numel()))

    def _unshard(self, name: str, key: str, shard: Tensor) -> Tensor:
        parameter = self.sharded[name].get(key)
        if parameter is None:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.world)]
        dist.all_gather(shards, shard.detach())
        return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Returns this rank's shards of the optimizer state; with stage 0, see `BaseEngine`."""
        if self.stage == 0:
            return super().save_state(folder)
        return {name: plain(engine.optimizer.state_dict()) for name, engine in self.engines.items()}

    def load(
        self,
        weights: Mapping[str, Mapping[str, Tensor]],
        means: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Restores a checkpoint; above stage 0 with the stage and number of ranks that saved it."""
        if self.stage == 0:
            return super().load(weights, means, state, folder)
        for name, tensors in weights.items():
            for key, shard in self._local_weights(name).items():
                shard.copy_(self._shard(name, key, tensors[key]))
            zero = self.engines[name].optimizer
            vars(zero.loss_scaler).update(state[name]["loss_scaler"])
            own = {**state[name], "loss_scaler": zero.loss_scaler}
            with self._own_options(name):
                zero.load_state_dict(
                    [own] * self.world, load_optimizer_states=True, load_from_fp32_weights=True
                )
        self._load_averages(means)


def import_deepspeed() -> Any:
    """Imports DeepSpeed, without its log lines and without compiling any of its extensions.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise UserError(
            "engine=deepspeed needs a package that is not installed: pip install deepspeed"
        ) from None
    # DeepSpeed calls functions of torch.distributed that have newer names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # This extension takes a minute to compile and is only used with Gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    return deepspeed


def loss_scaler() -> Any:
    """Returns a DeepSpeed loss scaler that behaves as torch's `GradScaler`."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    options = {
        "delayed_shift": 1,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": False,
        "dtype": torch.half,
    }
    return DynamicLossScaler(init_scale=2**16, scale_window=2000, min_scale=1.0, **options)


def overridden(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Overrides a DeepSpeed config with a JSON file, except for the keys in `OURS`.

    Args:
        config: the config.
        path: the JSON file.

    Returns:
        The new config, and a sentence for the log about what changed and what was ignored.

    Raises:
        UserError: the file is not readable JSON, or not a JSON object.
    """
    try:
        given = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"engine.ds_config={path} is not readable JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(
            f"engine.ds_config={path} is not a JSON object: give a DeepSpeed configuration"
        )
    taken = {key: value for key, value in given.items() if key not in OURS}
    before, now = dict(flat(config)), dict(flat(taken))
    changes = [
        f"{key}={now[key]}" + (f" (was {before[key]})" if key in before else "")
        for key in now
        if before.get(key) != now[key]
    ]
    ignored = [f"{key} (use {OURS[key]} instead)" for key in given if key in OURS]
    summary = (
        f"{path} sets {', '.join(changes) or 'nothing'}; ignored: {', '.join(ignored) or 'nothing'}"
    )
    zero = {**config["zero_optimization"], **taken.get("zero_optimization", {})}
    return {**config, **taken, "zero_optimization": zero}, summary


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a ZeRO optimizer's state to tensors and plain values, which are safe to load."""
    kept = {key: value for key, value in state.items() if key != "param_slice_mappings"}
    return {
        **kept,
        "loss_scaler": dict(vars(state["loss_scaler"])),
        "zero_stage": int(state["zero_stage"]),
    }
