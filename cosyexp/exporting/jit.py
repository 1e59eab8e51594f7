"""TorchScript files, which libtorch runs without Python."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.registry import register


@register("format")
class Jit(ComponentFormat):
    """An fp16 file takes and gives fp16, as the original's do."""

    name, suffix = "jit", "zip"

    def runtime(self) -> str:
        return f"TorchScript of PyTorch {torch.__version__}"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Scripted, so that every branch and size stays, and frozen."""
        if precision == "fp16":
            component = copy.deepcopy(component).half()  # type: ignore[attr-defined]
        methods = list(getattr(component, "methods", ()))
        content = io.BytesIO()  # where the disk is full, torch's own writer ends the process
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
        path.write_bytes(content.getbuffer())

    def load(self, path: Path, precision: str = "fp32") -> Callable[..., tuple[Tensor, ...]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path))

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            if precision == "fp16":
                inputs = tuple(x.half() if x.is_floating_point() else x for x in inputs)
            with torch.no_grad():
                outputs = module(*inputs)
            every = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(x.float() if x.is_floating_point() else x for x in every)

        return run


@contextmanager
def plain_graphs() -> Iterator[None]:
    """Static fusion and no profiling, so that a file does not depend on what ran before; TorchScript's calls for its end are hidden."""
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
