"""Components: the parts of a model that are exported, as listed in the YAML of its network."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cosyexp.errors import UserError
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.registry import build, get_class


class Component(Protocol):
    """Protocol of components: a module that can be exported on its own.

    To export another part of a model, write such a class and list it in the YAML of a network.
    These class attributes are optional:

        only_formats: formats that it is for; by default all.
        excluded_formats: formats that it cannot be exported to, with the reason.
        tied: sizes that depend on another; {"frames": (2, "token_len")} is at most two per token.
        precisions: precisions by format; by default all those of the format.
        full: names of submodules that stay in full precision in an fp16 or int8 file.
        methods: names of methods that a TorchScript file has in addition to `forward`.

    Attributes:
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        dynamic: for each of them by name, its dynamic dimensions, with a name for their size, which
            is also the name of the axis in ONNX files.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs of `batch` rows; each component defines what `size` counts."""
        ...

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Computes the outputs."""
        ...


def supported_precisions(
    component: type[Component], form: str, precisions: Sequence[str]
) -> Sequence[str]:
    """Returns the precisions in which a component can be exported to a format; may be empty.

    Args:
        component: class of the component.
        form: name of the format.
        precisions: all precisions of the format.
    """
    only = getattr(component, "only_formats", (form,))
    if form not in only or form in getattr(component, "excluded_formats", {}):
        return ()
    own: Mapping[str, Sequence[str]] = getattr(component, "precisions", {})
    return own.get(form, precisions)


def select_components(
    source: ExportSource,
    names: Sequence[str] | None,
    form: str,
    precision: str,
    precisions: Sequence[str],
) -> list[str]:
    """Returns the names of the components to export.

    Args:
        source: the model.
        names: of components; None for all that can be exported.
        form: name of the format.
        precision: of the export.
        precisions: all precisions of the format.

    Raises:
        UserError: a name is unknown, or cannot be exported in this format and precision.
    """
    nodes = source.config.components
    if not nodes:
        raise UserError(f"{source.name} lists no components to export: see its network's YAML")
    if unknown := sorted(set(names or ()) - nodes.keys()):
        raise UserError(f"{source.name} has no component {unknown[0]}: it has {', '.join(nodes)}")
    classes = {name: get_class(node, "component") for name, node in nodes.items()}
    possible = {name: supported_precisions(c, form, precisions) for name, c in classes.items()}
    selected = [name for name in names or nodes if precision in possible[name]]
    missing = [name for name in names or () if name not in selected]
    if not selected:
        missing = missing or list(nodes)
    if missing:
        name = missing[0]
        reason = getattr(classes[name], "excluded_formats", {}).get(form)
        other = f"give precision={','.join(possible[name])}" if possible[name] else ""
        remedy = other or "give format=" + " or ".join(
            getattr(classes[name], "only_formats", ["onnx"])
        )
        raise UserError(
            f"{name} of {source.name} cannot be exported as format={form} precision={precision}"
            f"{f' ({reason})' if reason else ''}: {remedy}"
        )
    return selected


def load_components(
    source: ExportSource, names: Sequence[str] | None = None
) -> dict[str, Component]:
    """Builds components with their weights, ready for inference.

    Args:
        source: the model.
        names: of components; None for all.

    Returns:
        The components by name.
    """
    network = load_network(source)
    fold_parametrizations(network)
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = float(module.p)  # TorchScript does not take 0 for 0.0
    nodes = source.config.components
    return {name: build(nodes[name], "component", network).eval() for name in names or nodes}


def component_class(node: Mapping[str, Any]) -> type[Component]:
    """Returns the class that a node of `components` names, without building it."""
    component: type[Component] = get_class(node, "component")
    return component


def fold_parametrizations(network: nn.Module) -> None:
    """Replaces each weight norm by the weight that it computes."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
