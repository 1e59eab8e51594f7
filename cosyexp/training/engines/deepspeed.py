"""Optimizer state, gradients, weights in shards, by DeepSpeed's ZeRO stages 1, 2, 3 (Rajbhandari et al. 2020); 0 shards nothing."""

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.objectives.base import Trainable
from cosyexp.run.directory import flat
from cosyexp.training.engines.common import BaseEngine

log = logging.getLogger(__name__)
OURS = {  # keys of a DeepSpeed JSON that the configs of a run decide
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


class DeepSpeed(BaseEngine):
    """One DeepSpeed engine a trainable, so that a GAN trains too. Losses, accumulation, precision and schedules are the trainer's.

    DeepSpeed keeps fp32 weights and sees no accumulation: a loss is a share of the step's, computed under our autocast. A trainable is
    called as a bare module, whose hooks gather sharded weights.

    stage: of ZeRO. offload_optimizer, offload_weights: to the host's memory (the weights with stage 3 alone).
    ds_config: a JSON of DeepSpeed's, for what is not said elsewhere.
    """

    equal_batches = True
    needs_group = True

    def __init__(
        self,
        *,
        stage: int = 2,
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
            "train_micro_batch_size_per_gpu": 1,  # an utterance count that nothing depends on
            "gradient_clipping": options.get("max_grad_norm")
            or 0.0,  # where it is missing, DeepSpeed clips to 1
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
        self.sharded: dict[str, dict[str, Any]] = {}  # weights that lie in parts, by trainable

    def setup(
        self, trainables: Mapping[str, Trainable], frozen_modules: Sequence[nn.Module]
    ) -> None:
        if self.changes:
            log.info(self.changes)
        super().setup(trainables, frozen_modules)

    def _placed(self, name: str) -> None:
        module = self.trainables[name].module
        try:
            self.engines[name], *_ = self.deepspeed.initialize(
                model=module,
                optimizer=self.optimizers[name],
                config=self.config,
                dist_init_required=False,
            )
        except ValueError as error:  # of its config
            raise UserError(
                f"DeepSpeed refuses engine.ds_config= or another key of engine: {' '.join(str(error).split())}"
            ) from None
        if self.stage and self.dtype is torch.float16:
            self.engines[name].optimizer.loss_scaler = loss_scaler()
        named = module.named_parameters(remove_duplicate=False)
        self.sharded[name] = {
            key: parameter for key, parameter in named if hasattr(parameter, "ds_tensor")
        }

    def backward(self, name: str, loss: Tensor, last: bool = True) -> None:
        engine = self.engines[name]
        engine.set_gradient_accumulation_boundary(last)
        if self.stage:
            engine.optimizer.clear_backward_seen_flag()  # else stage 3 takes this backward for the first of the step
        scaled = loss if self.stage else self.scalers[name].scale(loss)
        engine.backward(scaled * self.world)  # DeepSpeed takes the mean over ranks

    def _update(self, name: str) -> tuple[Tensor, Tensor]:
        if self.stage == 0:
            return super()._update(name)
        engine = self.engines[name]
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=self.device)
        return norm, torch.as_tensor(not engine.optimizer.overflow, device=self.device)

    def close(self) -> None:
        if self.owns_group:
            self.deepspeed.comm.destroy_process_group()  # which forgets the groups it made, for the next run of this process

    # a checkpoint ---------------------------------------------------------------------------------------------------

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {
            **super()._parts(name),
            **{key: parameter.ds_tensor for key, parameter in self.sharded[name].items()},
        }

    def _part(self, name: str, key: str, whole: Tensor) -> Tensor:
        parameter = self.sharded[name].get(key)
        if parameter is None:
            return whole
        size = parameter.ds_tensor.numel()
        own = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        return torch.nn.functional.pad(own, (0, size - own.numel()))

    def _whole(self, name: str, key: str, part: Tensor) -> Tensor:
        parameter = self.sharded[name].get(key)
        if parameter is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part.detach())
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def save_state(self, folder: Path) -> dict[str, Any]:
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
        if self.stage == 0:
            return super().load(weights, means, state, folder)
        for name, tensors in weights.items():
            for key, part in self._parts(name).items():
                part.copy_(self._part(name, key, tensors[key]))
            zero = self.engines[name].optimizer
            vars(zero.loss_scaler).update(state[name]["loss_scaler"])
            own = {**state[name], "loss_scaler": zero.loss_scaler}
            zero.load_state_dict(
                [own] * self.world, load_optimizer_states=True, load_from_fp32_weights=True
            )
        self._load_means(means)


def import_deepspeed() -> Any:
    """Quietly, and without compiling anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise UserError(
            "engine=deepspeed needs a package that is not installed: pip install 'cosyexp[deepspeed]'"
        ) from None
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # what it calls has newer names
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # it would be compiled for a minute, for Gloo alone
    )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", "0")  # it does not start without
    return deepspeed


def loss_scaler() -> Any:
    """As torch's GradScaler begins and goes on."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    options = {
        "delayed_shift": 1,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": False,
        "dtype": torch.half,
    }
    return DynamicLossScaler(init_scale=2**16, scale_window=2000, min_scale=1.0, **options)


def overridden(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """The config with what a JSON says over it, and that in a sentence; the JSON cannot decide what a run's own config does."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"engine.ds_config={path} is no JSON that can be read: {error}") from None
    if not isinstance(given, dict):
        raise UserError(
            f"engine.ds_config={path} holds no JSON object: give one as DeepSpeed takes it"
        )
    taken = {key: value for key, value in given.items() if key not in OURS}
    before, now = dict(flat(config)), dict(flat(taken))
    changes = [
        f"{key}={now[key]}" + (f" (was {before[key]})" if key in before else "")
        for key in now
        if before.get(key) != now[key]
    ]
    left = [f"{key} (see {OURS[key]})" for key in given if key in OURS]
    said = f"{path} sets {', '.join(changes) or 'nothing'}; not taken from it: {', '.join(left) or 'nothing'}"
    zero = {**config["zero_optimization"], **taken.get("zero_optimization", {})}
    return {**config, **taken, "zero_optimization": zero}, said


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A ZeRO optimizer's state without its objects, which no safe reader takes."""
    kept = {key: value for key, value in state.items() if key != "param_slice_mappings"}
    return {
        **kept,
        "loss_scaler": dict(vars(state["loss_scaler"])),
        "zero_stage": int(state["zero_stage"]),
    }
