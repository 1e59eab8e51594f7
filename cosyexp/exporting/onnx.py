"""ONNX files, and ONNX Runtime to run them."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.precision import to_fp16, to_int8
from cosyexp.registry import register

TRACED = 24, 2  # size and rows of the inputs that the exporter looks at
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
CONVERTERS = {"fp16": to_fp16, "int8": to_int8}


@register("format")
class Onnx(ComponentFormat):
    """Inputs and outputs are fp32 in all precisions. opset: version of the operator set."""

    name, suffix = "onnx", "onnx"
    precisions = ("fp32", "fp16", "int8")

    def __init__(self, *, opset: int = 18) -> None:
        self.opset = opset

    def runtime(self) -> str:
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__} ({providers()[0]})"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """One self-contained file; sizes stay dynamic where the component says so."""
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
            if precision == "fp32":
                program.save(str(path), external_data=False)
            else:
                onnx.save(
                    CONVERTERS[precision](program.model_proto, getattr(component, "full", ())),
                    str(path),
                )

    def load(self, path: Path, precision: str = "fp32") -> Callable[..., tuple[Tensor, ...]]:
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
    """CUDA where it is, else the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name in PROVIDERS if name in available]


def example(component: Component) -> tuple[Tensor, ...]:
    """The inputs that an exporter looks at."""
    size, batch = TRACED
    return component.example(size, torch.Generator().manual_seed(0), batch)


def dimensions(component: Component) -> tuple[Any, ...]:
    """What may vary of each input, for `torch.export`."""
    return tuple(
        dict.fromkeys(component.dynamic.get(name, {}), torch.export.Dim.DYNAMIC) or None
        for name in component.inputs
    )


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
