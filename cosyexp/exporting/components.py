"""The exportable parts of a model: its network's YAML names them, under `components`."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import hydra.utils
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cosyexp.errors import UserError
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.run.targets import build, check_targets

Formats = Mapping[str, tuple[str, ...]]
ANYWHERE: Formats = {"onnx": ("fp32", "fp16", "int8"), "jit": ("fp32",), "pt2": ("fp32",)}


class Component(Protocol):
    """A module that stands alone. To export another part, write one of these and name it in `conf/network/`.

    inputs, outputs: names, in order. dynamic: the dimensions of each that may vary, by a name for their size; "2*N": at most twice another.
    A class may also have
        formats: in which formats and precisions it can be; default ANYWHERE.
        full: its submodules, by their names, that stay in full precision where the rest is fp16 or int8.
        methods: those that a TorchScript file has beside `forward`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Random inputs: `batch` rows of some size."""
        ...

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]: ...


def select_components(
    source: ExportSource, names: Sequence[str] | None, form: str, precision: str
) -> list[str]:
    """The components, all or those that are named, that can be in a format and precision; UserError where there are none."""
    nodes = source.config.get("components")
    if not nodes:
        raise UserError(f"{source.name} names no components to export: its network's YAML has none")
    if unknown := sorted(set(names or ()) - nodes.keys()):
        raise UserError(f"{source.name} has no component {unknown[0]}: it has {', '.join(nodes)}")
    possible = {
        name: getattr(component_class(node), "formats", ANYWHERE) for name, node in nodes.items()
    }
    found = [name for name in names or nodes if precision in possible[name].get(form, ())]
    if missing := [name for name in names or () if name not in found] or (
        [] if found else list(nodes)
    ):
        can = "; ".join(
            f"format={known} precision={','.join(values)}"
            for known, values in possible[missing[0]].items()
        )
        raise UserError(
            f"{missing[0]} of {source.name} cannot be exported as format={form} precision={precision}, but as {can}"
        )
    return found


def load_components(
    source: ExportSource, names: Sequence[str] | None = None
) -> dict[str, Component]:
    """Components, all or those that are named, ready for inference."""
    network = load_network(source)
    fold_parametrizations(network)
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = float(module.p)  # TorchScript takes no 0 for 0.0
    nodes = source.config["components"]
    return {name: build(nodes[name], network).eval() for name in names or nodes}


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
