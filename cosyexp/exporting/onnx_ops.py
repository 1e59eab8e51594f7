"""Translates operators of PyTorch to ONNX in forms that runtimes can fuse.

The translations of the exporter itself are correct too, but slower to run.
B batch, H heads, T time steps, K channels of a head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

HIDDEN = -1e4  # its softmax is 0, in fp16 too


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
    """Translates `scaled_dot_product_attention` (Vaswani et al. 2017, eq. 1).

    A query whose mask is False everywhere gets the mean of all values, instead of the zeros of
    PyTorch.

    Args:
        query: (B, H, T, K), as `key` and `value`.
        attn_mask: boolean, True where a query sees a key; None: everywhere.
        scale: factor of the scores; None: 1 / sqrt(K).
    """
    assert not (dropout_p or is_causal or enable_gqa), "not used by any network here"
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, op.Where(attn_mask, 0.0, HIDDEN))  # type: ignore[type-var]
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def gelu(x: Any, approximate: str = "none") -> Any:
    """Translates `gelu`: x Phi(x), or its approximation by tanh (Hendrycks & Gimpel 2016)."""
    if approximate == "none":
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)), 0.5)
    cubic = op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715))  # type: ignore[type-var]
    inner = op.Mul(cubic, math.sqrt(2 / math.pi))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


ONNX_OPS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.gelu.default: gelu,
}
