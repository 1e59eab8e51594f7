"""Small ONNX models with the signatures of the trained front ends."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(
    path: Path, nodes: list[Any], inputs: list[Any], output: Any, **constants: np.ndarray
) -> str:
    """Writes an ONNX model, and returns its path."""
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return str(path)


def tokenizer(path: Path, stride: int, batch: int | str = 1) -> str:
    """Writes a model with the signature of speech_tokenizer_v*.onnx, and returns its path.

    A speech token is the loudest band of every `stride`-th frame.
    """
    nodes = [
        helper.make_node("ArgMax", ["mel"], ["loudest"], axis=1, keepdims=0),
        helper.make_node("Slice", ["loudest", "start", "end", "axis", "stride"], ["some"]),
        helper.make_node("Unsqueeze", ["length", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "nothing"], ["zero"]),
        helper.make_node("Cast", ["zero"], ["zeros"], to=TensorProto.INT64),
        helper.make_node("Add", ["some", "zeros"], ["codes"]),
    ]
    inputs = [
        helper.make_tensor_value_info("mel", TensorProto.FLOAT, [batch, 128, "T"]),
        helper.make_tensor_value_info("length", TensorProto.INT32, [batch]),
    ]
    numbers = {
        "start": np.array([stride - 1]),
        "end": np.array([2**31]),
        "axis": np.array([1]),
        "stride": np.array([stride]),
    }
    output = helper.make_tensor_value_info("codes", TensorProto.INT64, [batch, "N"])
    return save(path, nodes, inputs, output, **numbers, nothing=np.array([0], np.int32))


def speaker_encoder(path: Path, width: int = 192) -> str:
    """Writes a model with the signature of campplus.onnx, and returns its path.

    An embedding is a projection of the mean square of each band.
    """
    nodes = [
        helper.make_node("Mul", ["bank", "bank"], ["power"]),
        helper.make_node("ReduceMean", ["power", "axis"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["embedding"]),
    ]
    weight = np.random.default_rng(0).standard_normal((80, width)).astype(np.float32)
    bank = helper.make_tensor_value_info("bank", TensorProto.FLOAT, [1, "T", 80])
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, width])
    return save(path, nodes, [bank], output, axis=np.array([1]), weight=weight)
