"""The device that synthesis, generation and front ends run on."""

from typing import Any

import torch

from cosyexp.errors import UserError

CPU = torch.device("cpu")
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"


def select_device(choice: str) -> torch.device:
    """Returns the device of a `device=` key.

    Args:
        choice: "auto" (the first GPU if there is one, or else the CPU), "cpu", "cuda", "cuda:1", or
            "mps".

    Raises:
        UserError: there is no such device.
    """
    available = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if choice == "auto":
        return torch.device(next(kind for kind, count in available.items() if count))
    kind, _, index = choice.partition(":")
    if kind not in available or (index and not index.isdecimal()):
        raise UserError(f"device={choice} is unknown: give auto, cpu, cuda, cuda:<number> or mps")
    if int(index or 0) >= available[kind]:
        found = [
            f"{name}:{i}" if n > 1 else name for name, n in available.items() for i in range(n)
        ]
        raise UserError(f"device={choice} is not available here: give auto, or {', '.join(found)}")
    return torch.device(choice)


def inference_device(choice: str) -> torch.device:
    """Returns the device of a `device=` key, on which fp32 convolutions are not rounded to TF32.

    The outputs are then those of a CPU up to rounding. Products of matrices are exact by default.

    Raises:
        UserError: there is no such device.
    """
    device = select_device(choice)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device


def onnx_providers(device: torch.device, tf32: bool = True) -> list[Any]:
    """Returns the execution providers of ONNX Runtime for a device, the preferred one first.

    Args:
        device: a GPU, or else the CPU is used.
        tf32: whether a GPU may round the factors of fp32 products to TF32.
    """
    if device.type != "cuda":
        return [CPU_PROVIDER]
    options = {"device_id": device.index or 0, "use_tf32": int(tf32)}
    return [(CUDA_PROVIDER, options), CPU_PROVIDER]
