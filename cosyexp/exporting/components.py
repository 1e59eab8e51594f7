"""The exportable parts of a trained run: its network's YAML names them, under `components`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import hydra.utils
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.run.targets import build, check_targets
from cosyexp.run.weights import load_weights


class Component(Protocol):
    """A module that stands alone. To export another part, write one of these and name it in `conf/network/`.

    inputs, outputs: names, in order. dynamic: the dimensions of each that may vary, by a name for their size.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]

    def example(self, size: int, draw: torch.Generator) -> tuple[Tensor, ...]:
        """Random inputs of some size."""
        ...

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]: ...


def load_components(run: RunDirectory, weights: Path) -> dict[str, Component]:
    """All components of a run with the weights in a file, ready for inference."""
    config = run.config()
    if not config.get("components"):
        raise UserError(f"{run} names no components to export: its network's YAML has none")
    network: nn.Module = build(config["network"])
    load_weights(network, weights)
    fold_parametrizations(network)
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = float(module.p)  # TorchScript takes no 0 for 0.0
    return {name: build(node, network).eval() for name, node in config["components"].items()}


def component_class(node: Mapping[str, Any]) -> type[Component]:
    """What a node of `components` names, without building it."""
    check_targets(node)
    found: type[Component] = hydra.utils.get_class(node["_target_"])
    return found


def fold_parametrizations(network: nn.Module) -> None:
    """Replaces each weight norm by the weight it makes."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
