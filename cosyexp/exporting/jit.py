"""TorchScript files, which libtorch runs without Python."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat


class Jit(ComponentFormat):
    name, suffix = "jit", "zip"

    def write(self, component: Component, path: Path) -> None:
        """Scripted, so that every branch and size stays, and frozen."""
        with warnings.catch_warnings():  # TorchScript is deprecated, and says so at every step
            warnings.simplefilter("ignore")
            content = io.BytesIO()  # where the disk is full, torch's own writer ends the process
            try:
                scripted = torch.jit.script(component)
            except (OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"{path.name.strip('.')} cannot be scripted ({reason}): give format=onnx") from None
            torch.jit.save(torch.jit.freeze(scripted), content)
            path.write_bytes(content.getbuffer())

    def load(self, path: Path) -> Callable[..., tuple[Tensor, ...]]:
        """A function of the component's inputs, in order."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path))

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs = module(*inputs)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return run
