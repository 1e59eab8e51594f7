"""Safetensors files, read and written one tensor at a time.

The library reads by mapping the file, which counts as memory, and writes only what is all in memory; averaging and ZeRO want neither.
Its files and ours are the same. Format: 8 bytes of length, a JSON header of names, then the numbers.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.errors import UserError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}


class TensorFile:
    """An open safetensors file: `file[name]` reads that tensor alone. ValueError where it is no such file, or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)
        size = os.fstat(self._handle).st_size
        try:
            (length,) = struct.unpack("<Q", os.pread(self._handle, 8, 0))
            header = json.loads(os.pread(self._handle, min(length, size), 8))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {
                name: (TYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0], 8 + length + e["data_offsets"][1])
                for name, e in header.items()
            }
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            self.close()
            raise UserError(f"{path} is no safetensors file: restore it, or make it again") from None
        if max((end for *_, end in self._entries.values()), default=0) > size:
            self.close()
            raise UserError(f"{path} is cut short: restore it, or make it again")

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._entries[name][:2]

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, start, end = self._entries[name]
        if end == start:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(end - start)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            read = os.preadv(self._handle, [view[done:]], start + done)
            if not read:
                raise UserError(f"{self.path} is cut short: restore it, or make it again")
            done += read
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_tensors(path: Path) -> dict[str, Tensor]:
    with TensorFile(path) as file:
        return {name: file[name] for name in file.keys()}  # noqa: SIM118


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as they come, in the order of `shapes`, and waits until the file is on the disk."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * int(torch.tensor(shape).prod()) if shape else dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, shape in shapes.values():
            tensor = next(tensors)
            assert tensor.dtype == dtype and tuple(tensor.shape) == shape
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
        assert next(tensors, None) is None, "more tensors than shapes"
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, shapes, iter(tensors.values()), metadata)
