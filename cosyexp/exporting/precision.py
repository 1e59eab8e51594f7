"""Converts ONNX models to fp16, or their weights to int8."""

import ast
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

# Operators with weights.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
# Operators that sum up many numbers, and therefore stay in fp32.
SUMS = (
    "Softmax",
    "LogSoftmax",
    "LayerNormalization",
    "InstanceNormalization",
    "ReduceMean",
    "ReduceSum",
    "ReduceL2",
    "CumSum",
)
SINES = ("Sin", "Cos")
# Metadata in which the exporter records the modules, and their classes, that a node comes from.
SCOPES, CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"
LEAST = 4096  # minimum number of elements of a weight that is stored in int8


def to_fp16(model: onnx.ModelProto, full: Sequence[str] = ()) -> onnx.ModelProto:
    """Converts a model to half precision, except where it costs accuracy.

    In fp32 stay norms, softmax and other sums, the computation of angles (see `angles`), the
    modules in `full`, and inputs and outputs.

    Args:
        model: the model, which is changed.
        full: names of the modules that stay in fp32.
    """
    from onnxruntime.transformers import float16

    exact = {
        node.name
        for node in model.graph.node
        if node.op_type in SUMS or stays(node, full) or is_norm(node)
    } | angles(model)
    converted = float16.convert_float_to_float16(
        model, keep_io_types=True, node_block_list=sorted(exact)
    )
    # Some of the types in it are those from before the conversion.
    del converted.graph.value_info[:]
    # Before version 1.32 the converter writes the same cast once for each node that uses it.
    nodes = list({tuple(node.output): node for node in converted.graph.node}.values())
    del converted.graph.node[:]
    converted.graph.node.extend(nodes)
    ordered = ir.from_proto(without_detours(converted))
    # The converter appends its casts at the end. Runtimes accept that, but the standard does not.
    ordered.graph.sort()
    return ir.to_proto(ordered)


def to_int8(model: onnx.ModelProto, full: Sequence[str] = ()) -> onnx.ModelProto:
    """Stores weights in int8, with a scale for each row.

    The standard operator `DequantizeLinear` restores them, and everything is computed in fp32.

    Args:
        model: the model, which is changed.
        full: names of the modules whose weights stay in fp32.
    """
    graph = model.graph
    uses = [node for node in graph.node if node.op_type in (*WEIGHTED, "Transpose")]
    weights = {name for node in uses if not stays(node, full) for name in node.input}
    weights -= {name for node in graph.node if stays(node, full) for name in node.input}
    dequantized = []
    for tensor in list(graph.initializer):
        if (
            tensor.name not in weights
            or tensor.data_type != TensorProto.FLOAT
            or len(tensor.dims) < 2
            or np.prod(tensor.dims) < LEAST
        ):
            continue
        values = numpy_helper.to_array(tensor)
        scale = np.abs(values).max(axis=tuple(range(1, values.ndim))).clip(min=1e-12) / 127
        rounded = np.round(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        parts = [
            numpy_helper.from_array(rounded, f"{tensor.name}.int8"),
            numpy_helper.from_array(scale, f"{tensor.name}.scale"),
        ]
        dequantized.append(
            helper.make_node(
                "DequantizeLinear",
                [part.name for part in parts],
                [tensor.name],
                f"{tensor.name}.node",
                axis=0,
            )
        )
        graph.initializer.remove(tensor)
        graph.initializer.extend(parts)
    nodes = [*dequantized, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def origin(node: onnx.NodeProto, key: str) -> list[str]:
    """Returns what the exporter recorded of a node under a key; empty if nothing."""
    return next(
        (ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == key), []
    )


def stays(node: onnx.NodeProto, full: Sequence[str]) -> bool:
    """Returns whether a node belongs to one of the modules that stay in full precision."""
    return any(part in scope.split(".") for scope in origin(node, SCOPES) for part in full)


def is_norm(node: onnx.NodeProto) -> bool:
    """Returns whether a node is a part of a norm, other than an operator with weights."""
    return node.op_type not in WEIGHTED and any(
        "Norm" in name.rsplit(".", 1)[-1] for name in origin(node, CLASSES)
    )


def angles(model: onnx.ModelProto) -> set[str]:
    """Returns the names of the nodes that compute sines and cosines, and their arguments.

    They go back to the last operator with weights. An angle of many turns needs full precision.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    pending, found = [node for node in model.graph.node if node.op_type in SINES], set()
    while pending:
        node = pending.pop()
        if node.name not in found and node.op_type not in WEIGHTED:
            found.add(node.name)
            pending += [producers[name] for name in node.input if name in producers]
    return found


def without_detours(model: onnx.ModelProto) -> onnx.ModelProto:
    """Removes detours through fp16: a cast of fp32 numbers to fp16 and directly back."""
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        before = producers.get(node.input[0]) if casts(node, TensorProto.FLOAT) else None
        if before is not None and casts(before, TensorProto.FLOAT16):
            node.input[0] = before.input[0]
    used = {name for node in model.graph.node for name in node.input} | {
        output.name for output in model.graph.output
    }
    for node in [
        node
        for node in model.graph.node
        if casts(node, TensorProto.FLOAT16) and node.output[0] not in used
    ]:
        model.graph.node.remove(node)
    return model


def casts(node: onnx.NodeProto, to: int) -> bool:
    """Returns whether a node casts to a data type of `TensorProto`."""
    return node.op_type == "Cast" and node.attribute[0].i == to
