"""Logs learning rates and gradient norms, module by module."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.training.callbacks.base import Callback, StepStats

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer


@register("callback")
class Monitor(Callback):
    """Logs the learning rate of every parameter group and the gradient norm of every module.

    The norms are those that the optimizer sees: summed over ranks and clipped. A module is named by
    the first `depth` parts of its parameters' names, such as `monitor/grad_norm/llm.encoders`.

    Args:
        every: steps between two logs.
        depth: of the module names.

    Raises:
        ValueError: every or depth is out of range.
    """

    def __init__(self, *, every: int = 50, depth: int = 2) -> None:
        if every < 0 or depth < 1:
            raise ValueError(f"every={every} must be >= 0 and depth={depth} >= 1")
        self.every, self.depth = every, depth

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Hooks into every optimizer's step, where gradients are complete.

        Raises:
            UserError: the engine keeps gradients in flat shards, which have no modules.
        """
        self._norms: dict[str, Tensor] = {}
        self._trainer = trainer
        if trainer.engine.optimizer_layout != "whole":
            raise UserError(
                "callbacks=monitor reads the gradients of modules, which ZeRO stages 1 to 3 keep "
                "in flat shards: use engine=ddp, engine=fsdp or engine.stage=0"
            )
        for name, optimizer in trainer.engine.optimizers.items():
            module = trainer.objective.trainables[name].module
            names = {parameter: key for key, parameter in module.named_parameters()}

            def before_step(_: Any, *args: Any, name: str = name, names: Any = names) -> None:
                self._measure(name, names)

            optimizer.register_step_pre_hook(before_step)

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _measure(self, name: str, names: dict[Tensor, str]) -> None:
        if not self._is_due(self._trainer.progress.step + 1):
            return
        squares: dict[str, list[Tensor]] = defaultdict(list)
        for parameter, key in names.items():
            if parameter.grad is not None:
                module = ".".join(key.split(".")[: self.depth])
                squares[module].append(torch.linalg.vector_norm(parameter.grad).square())
        for module, values in squares.items():
            total = torch.stack([full(value) for value in values]).sum().sqrt()
            self._norms[f"monitor/grad_norm/{name}.{module}"] = total

    def on_step_end(self, trainer: "Trainer", stats: StepStats) -> None:
        """Logs what was measured in this step."""
        if not self._is_due(trainer.progress.step):
            return
        values = {key: float(norm) for key, norm in self._norms.items()}
        for name, optimizer in trainer.engine.optimizers.items():
            for i, group in enumerate(optimizer.param_groups):
                values[f"monitor/lr/{name}.{group.get('name', i)}"] = float(group["lr"])
        trainer.log(values)
        self._norms = {}


def full(value: Tensor) -> Tensor:
    """Returns a sharded tensor's whole value on every rank."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
