"""ONNX files, and ONNX Runtime to run them."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat

TRACED = 24  # size of the inputs that the exporter looks at


class Onnx(ComponentFormat):
    """opset: version of the operator set."""

    name, suffix = "onnx", "onnx"

    def __init__(self, *, opset: int = 18) -> None:
        self.opset = opset

    def write(self, component: Component, path: Path) -> None:
        """One self-contained file; sizes stay dynamic where the component says so."""
        shapes = tuple(dict.fromkeys(component.dynamic.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in component.inputs)
        with quiet():
            program = torch.onnx.export(
                component,  # type: ignore[arg-type]
                component.example(TRACED, torch.Generator().manual_seed(0)),
                dynamo=True,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                dynamic_shapes=shapes,
                opset_version=self.opset,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)

    def load(self, path: Path) -> Callable[..., tuple[Tensor, ...]]:
        """A function of the component's inputs, in order."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
        names = [node.name for node in session.get_inputs()]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            feeds = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
            return tuple(torch.from_numpy(output) for output in session.run(None, feeds))

        return run


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter speaks of its own inner workings, to the console and to the log."""
    level = logging.getLogger().level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)
