"""Reads and writes safetensors files tensor by tensor or in pieces, so that memory stays small.

The safetensors library validates a file here, but it reads by mapping the file, which counts as
memory of the process, and writes only tensors that are all in memory; averaging and ZeRO need
neither. The files are the same as the library's. Format: the length of the header in 8 bytes, the
header in JSON, then the numbers. A tensor with several names is written once; the metadata map its
additional names to the first, as the library's `save_model` does.
"""

import json
import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.run.documents import open_regular
from cosyexp.run.files import create

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
HEADER = 2**25  # bytes of a header
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Entry(NamedTuple):
    """Dtype and shape of a tensor, and the range of bytes that it occupies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file; `file[name]` reads that tensor only.

    Raises:
        UserError: the file is not a valid safetensors file, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._file = open_regular(path)
        self._handle = self._file.fileno()
        try:
            self._entries = self._index()
            self._refuse_overlaps()
        except BaseException:
            self.close()
            raise

    def _index(self) -> dict[str, Entry]:
        try:
            if int.from_bytes(os.pread(self._handle, 8, 0), "little") > HEADER:
                raise ValueError("its header is too large")
            with safe_open(self.path, "pt"):  # checks the header: sizes, shapes, offsets
                pass
            return self._header()
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is not a valid safetensors file, or is truncated ({error}): restore "
                f"it, or create it again"
            ) from None

    def _header(self) -> dict[str, Entry]:
        (length,) = struct.unpack("<Q", os.pread(self._handle, 8, 0))
        header = json.loads(os.pread(self._handle, length, 8))
        self.metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            if entry["dtype"] not in TYPES:
                raise UserError(
                    f"{self.path} holds {name} as {entry['dtype']}, which is not a type of weights "
                    f"that cosyexp reads ({', '.join(TYPES)}): convert the file"
                )
        entries = {
            name: Entry(
                TYPES[entry["dtype"]],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        aliases = {name: entries[same] for name, same in self.metadata.items() if same in entries}
        return aliases | entries

    def _refuse_overlaps(self) -> None:
        """Checks that different tensors do not share bytes.

        What is read then takes no more memory than the file has bytes.

        Raises:
            UserError: they do.
        """
        names = {entry: name for name, entry in self._entries.items()}
        reached, before = 0, ""
        for entry in sorted(names, key=lambda entry: (entry.start, entry.end)):
            if entry.start < reached:
                raise UserError(
                    f"{self.path} holds {before} and {names[entry]} in the same bytes: load the "
                    f"file and save copies of them"
                )
            reached, before = entry.end, names[entry]

    def keys(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Returns the dtype and the shape of a tensor."""
        return self._entries[name][:2]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def stub(self, name: str) -> Tensor:
        """Returns a tensor of this dtype and shape without memory."""
        dtype, shape = self.shape(name)
        return torch.empty(shape, dtype=dtype, device="meta")

    def storage_key(self, name: str) -> object:
        """Returns a key that is equal for two names of one tensor."""
        return self._entries[name]

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self.piece(
            name, 0, math.prod(entry.shape), bytearray(entry.end - entry.start)
        ).reshape(entry.shape)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Returns some of the tensors; names of one tensor share it."""
        read: dict[object, Tensor] = {}
        for name in names:
            if (key := self.storage_key(name)) not in read:
                read[key] = self[name]
        return {name: read[self.storage_key(name)] for name in names}

    def piece(self, name: str, begin: int, count: int, into: bytearray) -> Tensor:
        """Reads some consecutive numbers of a tensor.

        Args:
            name: the tensor.
            begin: index of the first number in the flattened tensor.
            count: how many numbers to read.
            into: a buffer of at least `count` numbers, which is overwritten from its start.

        Returns:
            The numbers, (count,); they share the memory of the buffer.

        Raises:
            UserError: the file ends before the numbers do.
        """
        dtype, _, start, _ = self._entries[name]
        if not count:
            return torch.empty(0, dtype=dtype)
        view, done = memoryview(into)[: count * dtype.itemsize], 0
        while done < len(view):
            read = os.preadv(self._handle, [view[done:]], start + begin * dtype.itemsize + done)
            if not read:
                raise UserError(f"{self.path} is truncated: restore it, or create it again")
            done += read
        return torch.frombuffer(into, dtype=dtype, count=count)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a safetensors file, on the CPU; names of one tensor share it."""
    with TensorFile(path) as file:
        return file.read(file.keys())


def write_tensors(
    path: Path,
    shapes: Shapes,
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
    same: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file without holding all of its tensors in memory.

    Args:
        path: the file; it is synced to disk.
        shapes: dtype and shape of each tensor, by name.
        tensors: the tensors in the order of `shapes`, whole or as consecutive flat pieces.
        metadata: strings for the header.
        same: additional names of tensors, each with the name that the tensor has in `shapes`.
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
    with create(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, shape in shapes.values():
            write_pieces(file, dtype, math.prod(shape), tensors)
        assert next(tensors, None) is None, "more tensors than shapes"


def write_pieces(file: IO[bytes], dtype: torch.dtype, count: int, pieces: Iterator[Tensor]) -> None:
    """Writes one tensor of `count` numbers from consecutive pieces.

    It takes pieces until the tensor is complete: at least one, even if the tensor is empty.
    """
    while True:
        piece = next(pieces)
        assert piece.dtype == dtype and piece.numel() <= count
        file.write(piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        count -= piece.numel()
        del piece  # frees its memory before the next one is computed
        if not count:
            return


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a safetensors file; one that is stored under several names is written once.

    Args:
        path: the file; it is synced to disk.
        tensors: the tensors by name, on any device.
        metadata: strings for the header.
    """
    first: dict[object, str] = {}
    same = {}
    for name, tensor in tensors.items():
        storage = (
            (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel()
            else name
        )
        if first.setdefault(storage, name) != name:
            same[name] = first[storage]
    kept = {name: tensor for name, tensor in tensors.items() if name not in same}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    write_tensors(path, shapes, iter(kept.values()), metadata, same)
