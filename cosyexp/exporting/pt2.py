"""The export format pt2: `torch.export` programs, which run without the code of the model."""

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from cosyexp.device import CPU
from cosyexp.errors import UserError
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.onnx import example, quiet
from cosyexp.registry import register
from cosyexp.run.files import create


@register("format")
class Pt2(ComponentFormat):
    """Writes `torch.export` programs.

    Args:
        compile: compile them for this machine with AOTInductor, which needs a C++ compiler.
    """

    name = "pt2"

    def __init__(self, *, compile: bool = False) -> None:
        self.compile = compile
        self.suffix = "compiled.pt2" if compile else "pt2"

    def device(self, choice: str) -> torch.device:
        """Returns where the files run; compiled ones run on CPUs.

        Raises:
            UserError: compiled files are to run elsewhere, or there is no such device.
        """
        device = CPU if self.compile and choice == "auto" else super().device(choice)
        if self.compile and device != CPU:
            raise UserError(
                f"format=pt2 with compile=true runs on CPUs, not on {choice}: give device=cpu"
            )
        return device

    def runtime(self, device: torch.device) -> str:
        """Returns the version of PyTorch, and which of its runtimes is used."""
        return f"{'AOTInductor' if self.compile else 'torch.export'} of PyTorch {torch.__version__}"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Exports a component with its dynamic sizes, and writes it.

        Raises:
            UserError: it is to be compiled, and there is no C++ compiler.
        """
        with quiet():
            program = torch.export.export(
                component,  # type: ignore[arg-type]
                example(component),
                dynamic_shapes=tied(component),
            )
            if self.compile:
                compiled(program, path)
            else:
                # Written to memory first, as torch's writer aborts the process on a full disk.
                content = io.BytesIO()
                torch.export.save(program, content)
                with create(path) as file:
                    file.write(content.getbuffer())

    def load(
        self, path: Path, precision: str = "fp32", device: torch.device = CPU
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Loads a program, or a package that was compiled for CPUs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: Any = (
                torch._inductor.aoti_load_package(str(path))
                if self.compile
                else move_to_device_pass(torch.export.load(str(path)), device).module()
            )

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs = module(*inputs)
            return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)

        return run


def tied(component: Component) -> tuple[Any, ...]:
    """Returns the dynamic dimensions of each input, with the relations between them.

    A tied size is exactly the multiple, not at most, as `torch.export` solves for all sizes.
    """
    multiples: Mapping[str, tuple[int, str]] = getattr(component, "tied", {})
    bases = {base: torch.export.Dim(base, min=2) for _, base in multiples.values()}

    def dimension(size: str) -> Any:
        if size in multiples:
            factor, base = multiples[size]
            return factor * bases[base]
        return bases.get(size, torch.export.Dim.DYNAMIC)

    return tuple(
        {axis: dimension(size) for axis, size in component.dynamic.get(name, {}).items()} or None
        for name in component.inputs
    )


def compiled(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles a program for this machine, and writes the package.

    Raises:
        UserError: there is no C++ compiler.
    """
    from torch._inductor.exc import InductorError

    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except InductorError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        raise UserError(
            "format.compile=true needs a C++ compiler, and there is none: install g++, or name one "
            "by CXX=..."
        ) from None
