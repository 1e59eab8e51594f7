"""Is what was exported the same function?"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosyexp.exporting.components import Component

SIZES = (7, 50, 133)  # odd and even ones, shorter and longer than what the exporter saw
TOLERANCE = 1e-4  # absolute, or relative where values are larger than 1
REPEATS = 5


def compare(component: Component, exported: Callable[..., tuple[Tensor, ...]]) -> dict[str, Any]:
    """Runs both on the same random inputs; returns the largest error of each output, and the latencies.

    An error is absolute, or relative where PyTorch's value is larger than 1.
    """
    draw = torch.Generator().manual_seed(1)
    errors = dict.fromkeys(component.outputs, 0.0)
    inputs: tuple[Tensor, ...] = ()
    for size in SIZES:
        inputs = component.example(size, draw)
        for name, wanted, found in zip(component.outputs, eager(component, *inputs), exported(*inputs), strict=True):
            error = ((wanted - found).abs() / wanted.abs().clamp(min=1)).max()
            errors[name] = max(errors[name], float(error.nan_to_num(nan=torch.inf)))
    return {
        "largest_error": errors,
        "milliseconds": {"torch": latency(eager, component, *inputs), "exported": latency(exported, *inputs)},
    }


@torch.no_grad()
def eager(component: Component, *inputs: Tensor) -> tuple[Tensor, ...]:
    outputs = component(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def latency(function: Callable[..., Any], *inputs: Any) -> float:
    """The shortest of some runs, in milliseconds."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function(*inputs)
        times.append(time.perf_counter() - began)
    return round(1000 * min(times), 3)
