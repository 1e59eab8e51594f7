"""Is what was exported the same function, and how fast is it?"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cosyexp.exporting.components import Component

Function = Callable[..., tuple[Tensor, ...]]
INPUTS, SHORTEST, LONGEST = 10, 16, 512
FRAMES = (200, 500, 1000)  # sizes that are timed
REPEATS = 3
TOLERANCE = 1e-4  # of fp32: absolute, or relative where values are larger than 1; above it is said, ten times as much is refused
TOLERANCES = {
    "fp32": TOLERANCE,
    "fp16": 0.02,
    "int8": 0.1,
}  # of the others: a share of the output's largest value


def trials() -> Iterator[tuple[int, int]]:
    """Sizes and numbers of rows of the inputs: random, one after another odd or not, and 1 row or 2."""
    sizes = torch.randint(
        SHORTEST // 2, LONGEST // 2, (INPUTS,), generator=torch.Generator().manual_seed(1)
    )
    for i, half in enumerate(sizes.tolist()):
        yield 2 * half + i % 2, 1 + i // 2 % 2


def compare(
    component: Component, exported: Function, precision: str = "fp32", name: str = ""
) -> dict[str, Any]:
    """Runs both on the same random inputs, PyTorch in fp32.

    Returns the largest error of each output, and of each input, and whether all of it `passes`.
    """
    draw = torch.Generator().manual_seed(1)
    errors, inputs, passed = dict.fromkeys(component.outputs, 0.0), [], True
    for size, batch in tqdm(list(trials()), desc=f"verifying {name}", leave=False, disable=None):
        given = component.example(size, draw, batch)
        pairs = list(zip(eager(component, *given), exported(*given), strict=True))
        passed = passed and all(passes(*pair, precision) for pair in pairs)
        found = dict(
            zip(component.outputs, (error(*pair, precision) for pair in pairs), strict=True)
        )
        errors = {output: max(errors[output], found[output]) for output in errors}
        inputs.append({"size": size, "batch": batch, "error": max(found.values())})
    return {"largest_error": errors, "inputs": inputs, "passed": passed}


def passes(wanted: Tensor, found: Tensor, precision: str) -> bool:
    """In fp32 by the measure of the original's tool, which allows what rounding does to an ill-conditioned network, and by ours."""
    if precision != "fp32":
        return error(wanted, found, precision) <= TOLERANCES[precision]
    return error(wanted, found, precision) <= 10 * TOLERANCE and torch.allclose(
        found.float(), wanted.float(), rtol=1e-2, atol=1e-4
    )


def error(wanted: Tensor, found: Tensor, precision: str) -> float:
    """By the measure of TOLERANCES; infinite where the shapes differ, or where something is no number."""
    if wanted.shape != found.shape or not wanted.numel():
        return 0.0 if wanted.shape == found.shape else torch.inf
    wanted, found = wanted.float(), found.float()
    size = wanted.abs().clamp(min=1) if precision == "fp32" else wanted.abs().max().clamp(min=1e-3)
    return float(((wanted - found).abs() / size).max().nan_to_num(nan=torch.inf))


@torch.no_grad()
def eager(component: Component, *inputs: Tensor) -> tuple[Tensor, ...]:
    outputs = component(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def latencies(component: Component, exported: Function) -> dict[str, dict[str, float]]:
    """Milliseconds of a call, by size, of PyTorch and of what was exported."""
    draw, found = torch.Generator().manual_seed(1), {}
    for size in FRAMES:
        given = component.example(size, draw)
        found[str(size)] = {
            "torch": latency(eager, component, *given),
            "exported": latency(exported, *given),
        }
    return found


def latency(function: Callable[..., Any], *inputs: Any) -> float:
    """The shortest of some calls, in milliseconds."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function(*inputs)
        times.append(time.perf_counter() - began)
    return round(1000 * min(times), 3)
