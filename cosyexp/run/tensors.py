"""Safetensors files, read and written one tensor, or one piece of a tensor, at a time.

The library reads by mapping the file, which counts as memory, and writes only what is all in memory; averaging and ZeRO want neither.
Its files and ours are the same. Format: 8 bytes of length, a JSON header of names, then the numbers. A tensor that has two names is
written once; the metadata say name = name, as the library's own `save_model` does it.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple, Self

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
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Entry(NamedTuple):
    """Where the numbers of a tensor are in its file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file: `file[name]` reads that tensor alone. UserError where it is no such file, or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._handle = os.open(path, os.O_RDONLY)
        try:
            self._entries = self._index()
            if (
                max((entry.end for entry in self._entries.values()), default=0)
                > os.fstat(self._handle).st_size
            ):
                raise UserError(f"{path} is cut short: restore it, or make it again")
        except BaseException:
            self.close()
            raise

    def _index(self) -> dict[str, Entry]:
        try:
            (length,) = struct.unpack("<Q", os.pread(self._handle, 8, 0))
            header = json.loads(
                os.pread(self._handle, min(length, os.fstat(self._handle).st_size), 8)
            )
            self.metadata = header.pop("__metadata__", {})
            begin = 8 + length
            entries = {
                name: Entry(
                    TYPES[e["dtype"]],
                    tuple(e["shape"]),
                    *(begin + offset for offset in e["data_offsets"]),
                )
                for name, e in header.items()
            }
            return entries | {
                name: entries[same] for name, same in self.metadata.items() if same in entries
            }
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.path} is no safetensors file: restore it, or make it again"
            ) from None

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._entries[name][:2]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def storage_key(self, name: str) -> object:
        """The same for two names of one tensor."""
        return self._entries[name]

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self.piece(
            name, 0, math.prod(entry.shape), bytearray(entry.end - entry.start)
        ).reshape(entry.shape)

    def piece(self, name: str, begin: int, count: int, into: bytearray) -> Tensor:
        """Reads `count` numbers of a tensor from the `begin`th on, into the start of a buffer, on which the result lies."""
        dtype, _, start, _ = self._entries[name]
        if not count:
            return torch.empty(0, dtype=dtype)
        view, done = memoryview(into)[: count * dtype.itemsize], 0
        while done < len(view):
            read = os.preadv(self._handle, [view[done:]], start + begin * dtype.itemsize + done)
            if not read:
                raise UserError(f"{self.path} is cut short: restore it, or make it again")
            done += read
        return torch.frombuffer(into, dtype=dtype, count=count)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_tensors(path: Path) -> dict[str, Tensor]:
    with TensorFile(path) as file:
        return {name: file[name] for name in file.keys()}  # noqa: SIM118


def write_tensors(
    path: Path,
    shapes: Shapes,
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
    same: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as they come, whole or in pieces, in the order of `shapes`, and waits until the file is on the disk.

    same: second names of tensors, with the first.
    """
    notes = {**(metadata or {}), **(same or {})}
    header: dict[str, object] = {"__metadata__": notes} if notes else {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, shape in shapes.values():
            write_pieces(file, dtype, math.prod(shape), tensors)
        assert next(tensors, None) is None, "more tensors than shapes"
        file.flush()
        os.fsync(file.fileno())


def write_pieces(file: IO[bytes], dtype: torch.dtype, count: int, pieces: Iterator[Tensor]) -> None:
    """Writes `count` numbers, taking pieces until they are complete: at least one, also for an empty tensor."""
    while True:
        piece = next(pieces)
        assert piece.dtype == dtype and piece.numel() <= count
        file.write(piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        count -= piece.numel()
        del piece  # before the next one is made
        if not count:
            return


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    first: dict[object, str] = {}
    same = {}
    for name, tensor in tensors.items():
        place = (
            (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel()
            else name
        )
        if first.setdefault(place, name) != name:
            same[name] = first[place]
    kept = {name: tensor for name, tensor in tensors.items() if name not in same}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    write_tensors(path, shapes, iter(kept.values()), metadata, same)
