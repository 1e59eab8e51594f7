"""Operators of PyTorch in ONNX, in forms that runtimes know to fuse. The exporter's own are right too, but slower to run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

HIDDEN = -1e4  # what a softmax makes nothing of, also in fp16


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Of (B, H, T, K) each, and a bool mask. A query that sees nothing gets the mean of all values, where PyTorch gives zeros."""
    assert not (dropout_p or is_causal or enable_gqa), "what no network here asks for"
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, op.Where(attn_mask, 0.0, HIDDEN))  # type: ignore[type-var]
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def gelu(x: Any, approximate: str = "none") -> Any:
    """x Phi(x), or its approximation by tanh (Hendrycks and Gimpel 2016)."""
    if approximate == "none":
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)), 0.5)
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715)), math.sqrt(2 / math.pi))  # type: ignore[type-var]
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


ONNX_OPS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.gelu.default: gelu,
}
