"""An export format: traced TorchScript."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.device import CPU
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.verify import eager


class Traced(ComponentFormat):
    """One `.traced.pt` per component; `cosyexp` compares it with PyTorch at many sizes."""

    name, suffix = "traced", "traced.pt"

    def runtime(self, device: torch.device) -> str:
        """Returns what runs the files."""
        return f"traced TorchScript of PyTorch {torch.__version__}"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Traces a component."""
        example = component.example(24, torch.Generator().manual_seed(0), 2)
        torch.jit.trace(component, example).save(str(path))

    def load(
        self, path: Path, precision: str = "fp32", device: torch.device = CPU
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Returns a function of the component's inputs."""
        module = torch.jit.load(str(path), map_location=device)
        return lambda *inputs: eager(module, *inputs)
