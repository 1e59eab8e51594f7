"""Programs of `torch.export`, which PyTorch runs without the model's code."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.onnx import example, quiet
from cosyexp.registry import register


@register("format")
class Pt2(ComponentFormat):
    """compile: for this machine, by AOTInductor, which takes a C++ compiler."""

    name = "pt2"

    def __init__(self, *, compile: bool = False) -> None:
        self.compile = compile
        self.suffix = "compiled.pt2" if compile else "pt2"

    def runtime(self) -> str:
        return f"{'AOTInductor' if self.compile else 'torch.export'} of PyTorch {torch.__version__}"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        with quiet():
            program = torch.export.export(
                component,  # type: ignore[arg-type]
                example(component),
                dynamic_shapes=tied(component),
            )
            if self.compile:
                compiled(program, path)
            else:
                content = (
                    io.BytesIO()
                )  # where the disk is full, torch's own writer ends the process
                torch.export.save(program, content)
                path.write_bytes(content.getbuffer())

    def load(self, path: Path, precision: str = "fp32") -> Callable[..., tuple[Tensor, ...]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: Any = (
                torch._inductor.aoti_load_package(str(path))
                if self.compile
                else torch.export.load(str(path)).module()
            )

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs = module(*inputs)
            return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)

        return run


def tied(component: Component) -> tuple[Any, ...]:
    """What may vary of each input; "2*N" always is twice the other size here, as the sizes of a program are all solved for."""
    names = {size for axes in component.dynamic.values() for size in axes.values()}
    bases = {
        base: torch.export.Dim(f"size_{base}", min=2)
        for name in names
        if "*" in name
        for base in [name.partition("*")[2]]
    }

    def dimension(size: str) -> Any:
        factor, _, base = size.rpartition("*")
        return int(factor) * bases[base] if factor else bases.get(base, torch.export.Dim.DYNAMIC)

    return tuple(
        {axis: dimension(size) for axis, size in component.dynamic.get(name, {}).items()} or None
        for name in component.inputs
    )


def compiled(program: torch.export.ExportedProgram, path: Path) -> None:
    from torch._inductor.exc import InductorError

    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except InductorError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        raise UserError(
            "format.compile=true takes a C++ compiler, and there is none: install g++, or name one by CXX=..."
        ) from None
