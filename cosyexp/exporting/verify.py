"""Compares an exported component with PyTorch, and measures its latency."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cosyexp.device import CPU
from cosyexp.exporting.components import Component

Function = Callable[..., tuple[Tensor, ...]]
INPUTS, SHORTEST, LONGEST = 10, 16, 512  # number of random inputs, and the range of their sizes
FRAMES = (200, 500, 1000)  # sizes for which the latency is measured
REPEATS = 3
# Of fp32: an absolute error, or a relative one where values are larger than 1. A larger error is
# reported, one that is ten times as large is refused.
TOLERANCE = 1e-4
# Of the other precisions: a share of the largest value of the output.
TOLERANCES = {"fp32": TOLERANCE, "fp16": 0.02, "int8": 0.1}


def trials() -> Iterator[tuple[int, int]]:
    """Yields random sizes, even and odd ones by turns, each with a number of rows, 1 or 2."""
    sizes = torch.randint(
        SHORTEST // 2, LONGEST // 2, (INPUTS,), generator=torch.Generator().manual_seed(1)
    )
    for i, half in enumerate(sizes.tolist()):
        yield 2 * half + i % 2, 1 + i // 2 % 2


def compare(
    component: Component,
    exported: Function,
    precision: str = "fp32",
    name: str = "",
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Runs PyTorch, in fp32 on the CPU, and the exported function on the same random inputs.

    Args:
        component: the component in PyTorch.
        exported: the exported function.
        precision: of the exported function.
        name: for the progress bar.
        device: of the exported function.

    Returns:
        `largest_error` of each output, `inputs` with the size, the number of rows and the error of
        each, and `passed`: whether all outputs are close enough, see `passes`.
    """
    draw = torch.Generator().manual_seed(1)
    errors, inputs, passed = dict.fromkeys(component.outputs, 0.0), [], True
    for size, batch in tqdm(list(trials()), desc=f"verifying {name}", leave=False, disable=None):
        given = component.example(size, draw, batch)
        outputs = [output.cpu() for output in exported(*(x.to(device) for x in given))]
        pairs = list(zip(eager(component, *given), outputs, strict=True))
        passed = passed and all(passes(*pair, precision) for pair in pairs)
        measured = dict(
            zip(component.outputs, (error(*pair, precision) for pair in pairs), strict=True)
        )
        errors = {output: max(errors[output], measured[output]) for output in errors}
        inputs.append({"size": size, "batch": batch, "error": max(measured.values())})
    return {"largest_error": errors, "inputs": inputs, "passed": passed}


def passes(wanted: Tensor, found: Tensor, precision: str) -> bool:
    """Returns whether an output is close enough to that of PyTorch.

    In fp32, it must meet the tolerances of the export tool of the original CosyVoice, which allow
    for rounding in an ill-conditioned network, and ten times `TOLERANCE`.

    Args:
        wanted: output of PyTorch.
        found: output of the exported function.
        precision: of the exported function.
    """
    if precision != "fp32":
        return error(wanted, found, precision) <= TOLERANCES[precision]
    return error(wanted, found, precision) <= 10 * TOLERANCE and torch.allclose(
        found.float(), wanted.float(), rtol=1e-2, atol=1e-4
    )


def error(wanted: Tensor, found: Tensor, precision: str) -> float:
    """Returns the largest error of an output, as `TOLERANCES` defines it.

    It is infinite if the shapes differ or a value is NaN.
    """
    if wanted.shape != found.shape or not wanted.numel():
        return 0.0 if wanted.shape == found.shape else torch.inf
    wanted, found = wanted.float(), found.float()
    size = wanted.abs().clamp(min=1) if precision == "fp32" else wanted.abs().max().clamp(min=1e-3)
    return float(((wanted - found).abs() / size).max().nan_to_num(nan=torch.inf))


def on_device(component: Component, device: torch.device) -> Component:
    """Moves a component, which is a module, and returns it."""
    moved: Component = component.to(device)  # type: ignore[attr-defined]
    return moved


@torch.no_grad()
def eager(component: Component, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Runs a component in PyTorch, and returns its outputs as a tuple."""
    outputs = component(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def latencies(
    component: Component, exported: Function, device: torch.device = CPU
) -> dict[str, dict[str, float]]:
    """Measures the latency of PyTorch and of the exported function, both on the device.

    Returns:
        Milliseconds per call, as `torch` and `exported`, by the size of the input.
    """
    draw, milliseconds = torch.Generator().manual_seed(1), {}
    moved = on_device(copy.deepcopy(component), device)
    for size in FRAMES:
        given = [x.to(device) for x in component.example(size, draw)]
        milliseconds[str(size)] = {
            "torch": latency(eager, moved, *given),
            "exported": latency(exported, *given),
        }
    return milliseconds


def latency(function: Callable[..., Any], *inputs: Any) -> float:
    """Returns the shortest of some calls, in milliseconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(*inputs)[0].cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return round(1000 * min(times), 3)
