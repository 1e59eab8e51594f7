"""The export format onnx: ONNX files, which run in ONNX Runtime."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from cosyexp.device import CPU, CPU_PROVIDER, CUDA_PROVIDER, onnx_providers
from cosyexp.errors import UserError
from cosyexp.exporting.axes import name_axes
from cosyexp.exporting.components import Component
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.precision import to_fp16, to_int8
from cosyexp.registry import register

TRACED = 24, 2  # size and number of rows of the example inputs that are traced
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

    def device(self, choice: str) -> torch.device:
        """Returns where the files run; "auto" is the CPU if ONNX Runtime is built for CPUs only."""
        import onnxruntime

        if choice == "auto" and CUDA_PROVIDER not in onnxruntime.get_available_providers():
            return CPU
        return super().device(choice)

    def runtime(self, device: torch.device) -> str:
        """Returns the version of ONNX Runtime, and the execution provider."""
        import onnxruntime

        provider = CUDA_PROVIDER if device.type == "cuda" else CPU_PROVIDER
        return f"ONNX Runtime {onnxruntime.__version__} ({provider})"

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Writes one self-contained file, with the dynamic sizes of the component."""
        self.save(self.program(component), component, path, precision)

    def program(self, component: Component) -> "torch.onnx.ONNXProgram":
        """Converts a component, in fp32."""
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
        return program

    def save(
        self, program: "torch.onnx.ONNXProgram", component: Component, path: Path, precision: str
    ) -> None:
        """Writes what `program` returned for a component, in a precision."""
        import onnx

        with quiet():
            if precision == "fp32":
                program.save(str(path), external_data=False)
            else:
                model = CONVERTERS[precision](program.model_proto, getattr(component, "full", ()))
                onnx.save(model, str(path))

    def load(
        self, path: Path, precision: str = "fp32", device: torch.device = CPU
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Opens a file in ONNX Runtime: on a GPU, or on as many CPU threads as torch uses.

        Raises:
            UserError: the device is a GPU that ONNX Runtime cannot use.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        providers = onnx_providers(device, tf32=precision != "fp32")
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if device.type == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot use {device}: install "
                f"onnxruntime-gpu for this version of CUDA, or give device=cpu"
            )
        run = run_on_gpu if device.type == "cuda" else run_on_cpu
        return lambda *inputs: run(session, inputs)


def run_on_cpu(session: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Runs a session on tensors of any device, through the host."""
    names = [node.name for node in session.get_inputs()]
    feeds = {
        name: value.cpu().contiguous().numpy() for name, value in zip(names, inputs, strict=True)
    }
    outputs = session.run(None, feeds)
    return tuple(torch.from_numpy(output).to(inputs[0].device) for output in outputs)


def run_on_gpu(session: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Runs a session on the memory of the inputs; the outputs stay on their device."""
    binding, device = session.io_binding(), inputs[0].device
    place = {"device_type": device.type, "device_id": device.index or 0}
    tensors = [value.contiguous() for value in inputs]  # alive until the session has run
    for node, value in zip(session.get_inputs(), tensors, strict=True):
        kind = torch.empty(0, dtype=value.dtype).numpy().dtype
        binding.bind_input(
            node.name,
            element_type=kind,
            shape=tuple(value.shape),
            buffer_ptr=value.data_ptr(),
            **place,
        )
    for node in session.get_outputs():
        binding.bind_output(node.name, **place)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the session has a stream of its own
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return tuple(from_dlpack(value._ortvalue.to_dlpack()) for value in binding.get_outputs())


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
