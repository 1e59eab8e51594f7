"""TorchScript files, which libtorch runs without Python."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat


class Jit(ComponentFormat):
    name, suffix = "jit", "zip"

    def write(self, component: Component, path: Path) -> None:
        """Scripted, so that every branch and size stays, and frozen."""
        with warnings.catch_warnings():  # TorchScript is deprecated, and says so at every step
            warnings.simplefilter("ignore")
            content = io.BytesIO()  # where the disk is full, torch's own writer ends the process
            torch.jit.save(torch.jit.freeze(torch.jit.script(component)), content)
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
