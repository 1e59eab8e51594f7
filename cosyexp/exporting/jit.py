"""The export format jit: TorchScript files, which run in libtorch without Python."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.device import CPU
from cosyexp.errors import UserError
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.registry import register
from cosyexp.run.files import create


@register("format")
class Jit(ComponentFormat):
    """Writes TorchScript files.

    Inputs and outputs of an fp16 file are fp16, as those of the original CosyVoice.
    """

    name, suffix = "jit", "zip"

    def runtime(self, device: torch.device) -> str:
        """Returns the version of PyTorch."""
        return f"TorchScript of PyTorch {torch.__version__}"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Scripts a component, which keeps its branches and sizes, freezes it and writes it.

        Raises:
            UserError: the component cannot be scripted.
        """
        if precision == "fp16":
            component = copy.deepcopy(component).half()  # type: ignore[attr-defined]
        methods = list(getattr(component, "methods", ()))
        # Written to memory first, as torch's writer aborts the process if the disk is full.
        content = io.BytesIO()
        with plain_graphs():
            try:
                scripted = torch.jit.script(component)
            except (OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{path.name} cannot be scripted ({reason}): give format=onnx"
                ) from None
            frozen = torch.jit.freeze(scripted, preserved_attrs=methods)
            torch.jit.save(torch.jit.optimize_for_inference(frozen, other_methods=methods), content)
        with create(path) as file:
            file.write(content.getbuffer())

    def load(
        self, path: Path, precision: str = "fp32", device: torch.device = CPU
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Loads a file; inputs and outputs of its function are fp32 in all precisions."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location=device)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            if precision == "fp16":
                inputs = tuple(x.half() if x.is_floating_point() else x for x in inputs)
            with torch.no_grad():
                outputs = module(*inputs)
            results = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(x.float() if x.is_floating_point() else x for x in results)

        return run


@contextmanager
def plain_graphs() -> Iterator[None]:
    """Turns on static fusion and turns off profiling inside the context.

    A file then does not depend on what ran before. Deprecation warnings of TorchScript are hidden.
    """
    fusion = torch.jit.set_fusion_strategy([("STATIC", 1)])
    profiling = torch._C._jit_set_profiling_mode(False)
    executor = torch._C._jit_set_profiling_executor(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._jit_set_profiling_executor(executor)
        torch._C._jit_set_profiling_mode(profiling)
        torch.jit.set_fusion_strategy(fusion)
