"""ONNX models with fp16 numbers, or with int8 weights."""

import ast
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
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
TURNS = ("Sin", "Cos")
SCOPES, CLASSES = (
    "pkg.torch.onnx.name_scopes",
    "pkg.torch.onnx.class_hierarchy",
)  # where the exporter says what a node comes from
LEAST = 4096  # numbers in a weight that is worth a scale for each of its rows


def to_fp16(model: onnx.ModelProto, full: Sequence[str] = ()) -> onnx.ModelProto:
    """Half precision but for norms, softmax and other sums, what makes the angles of sines, and the modules named in `full`.

    Inputs and outputs stay fp32.
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
    del converted.graph.value_info[:]  # the types that it notes are partly those from before
    ordered = ir.from_proto(without_detours(converted))
    ordered.graph.sort()  # the converter puts its casts last, which runtimes forgive and the standard does not
    return ir.to_proto(ordered)


def to_int8(model: onnx.ModelProto, full: Sequence[str] = ()) -> onnx.ModelProto:
    """Weights in int8 with a scale for each row; all is computed in fp32 (`DequantizeLinear`, a part of the standard)."""
    graph = model.graph
    uses = [node for node in graph.node if node.op_type in (*WEIGHTED, "Transpose")]
    weights = {name for node in uses if not stays(node, full) for name in node.input}
    weights -= {name for node in graph.node if stays(node, full) for name in node.input}
    made = []
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
        made.append(
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
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def said(node: onnx.NodeProto, key: str) -> list[str]:
    return next(
        (ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == key), []
    )


def stays(node: onnx.NodeProto, full: Sequence[str]) -> bool:
    """Whether it belongs to one of the modules that keep full precision."""
    return any(part in scope.split(".") for scope in said(node, SCOPES) for part in full)


def is_norm(node: onnx.NodeProto) -> bool:
    return node.op_type not in WEIGHTED and any(
        "Norm" in name.rsplit(".", 1)[-1] for name in said(node, CLASSES)
    )


def angles(model: onnx.ModelProto) -> set[str]:
    """Sines and cosines, and what comes before them since the last layer with weights: angles of many turns need all digits."""
    made = {output: node for node in model.graph.node for output in node.output}
    ahead, found = [node for node in model.graph.node if node.op_type in TURNS], set()
    while ahead:
        node = ahead.pop()
        if node.name not in found and node.op_type not in WEIGHTED:
            found.add(node.name)
            ahead += [made[name] for name in node.input if name in made]
    return found


def without_detours(model: onnx.ModelProto) -> onnx.ModelProto:
    """Numbers that were cut to fp16 and widened again at once keep their digits."""

    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        before = made.get(node.input[0]) if casts(node, TensorProto.FLOAT) else None
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
    return node.op_type == "Cast" and node.attribute[0].i == to
