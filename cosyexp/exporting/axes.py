"""Gives the dynamic axes of an ONNX model the names that its component declares."""

import re
from typing import Any

from cosyexp.exporting.components import Component


def name_axes(model: Any, component: Component) -> None:
    """Replaces the exporter's symbols, such as s13, by names such as `batch` and `seq_len`.

    Args:
        model: the `onnx_ir.Model`, changed in place.
        component: declares a name for each dynamic dimension of its inputs and outputs.
    """
    names: dict[str, str] = {}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for axis, name in component.dynamic.get(value.name, {}).items():
            symbol = str(value.shape[axis])
            if symbol.isidentifier():
                names.setdefault(symbol, name)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = type(value.shape)([_renamed(size, names) for size in value.shape])
    for value in [*model.graph.inputs, *model.graph.outputs]:
        declared = component.dynamic.get(value.name, {})
        sizes = [declared.get(axis, size) for axis, size in enumerate(value.shape)]
        value.shape = type(value.shape)(sizes)


def _renamed(dimension: Any, names: dict[str, str]) -> int | str | None:
    """Returns a dimension with the symbols of its formula renamed: `s23 + 3`, `text_len + 3`."""
    if isinstance(dimension, int):
        return dimension
    if dimension.value is None:
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), dimension.value)
