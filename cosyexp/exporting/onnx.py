"""The export format onnx: ONNX files, which run in ONNX Runtime."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyexp.exporting.axes import name_axes
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.precision import to_fp16, to_int8
from cosyexp.registry import register

TRACED = 24, 2  # size and number of rows of the example inputs that are traced
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
CONVERTERS = {"fp16": to_fp16, "int8": to_int8}


@register("format")
class Onnx(ComponentFormat):
    """Writes ONNX files, whose inputs and outputs are fp32 in all precisions.

    Args:
        opset: version of the ONNX operator set.
    """

    name, suffix = "onnx", "onnx"
    precisions = ("fp32", "fp16", "int8")

    def __init__(self, *, opset: int = 18) -> None:
        self.opset = opset

    def runtime(self) -> str:
        """Returns the version of ONNX Runtime, and the execution provider."""
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__} ({providers()[0]})"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Writes one self-contained file, with the dynamic sizes of the component."""
        import onnx

        from cosyexp.exporting.onnx_ops import ONNX_OPS

        with quiet():
            program = torch.onnx.export(
                component,  # type: ignore[arg-type]
                example(component),
                dynamo=True,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                dynamic_shapes=dimensions(component),
                opset_version=self.opset,
                custom_translation_table=ONNX_OPS,
                verbose=False,
            )
            assert program is not None
            name_axes(program.model, component)
            if precision == "fp32":
                program.save(str(path), external_data=False)
            else:
                onnx.save(
                    CONVERTERS[precision](program.model_proto, getattr(component, "full", ())),
                    str(path),
                )

    def load(self, path: Path, precision: str = "fp32") -> Callable[..., tuple[Tensor, ...]]:
        """Opens a file in ONNX Runtime, on as many threads as torch uses."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=providers())
        names = [node.name for node in session.get_inputs()]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            feeds = {
                name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)
            }
            return tuple(torch.from_numpy(output) for output in session.run(None, feeds))

        return run


def providers() -> list[str]:
    """Returns the execution providers to use: CUDA if it is available, and the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name in PROVIDERS if name in available]


def example(component: Component) -> tuple[Tensor, ...]:
    """Returns the example inputs that an exporter traces a component with."""
    size, batch = TRACED
    return component.example(size, torch.Generator().manual_seed(0), batch)


def dimensions(component: Component) -> tuple[Any, ...]:
    """Returns the dynamic dimensions of each input, for `torch.export`."""
    return tuple(
        dict.fromkeys(component.dynamic.get(name, {}), torch.export.Dim.DYNAMIC) or None
        for name in component.inputs
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what the exporter prints, logs and warns of inside the context."""
    level = logging.getLogger().level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)
