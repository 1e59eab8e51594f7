"""Files of torch.save, read and written one piece of a tensor at a time. What they hold besides tensors and numbers is never run.

Format: a zip archive without compression; `data.pkl` is a pickle that names, for each tensor, one of the storages `data/0`, `data/1`...
"""

import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.run.tensors import Entry, Shapes, TensorFile, write_pieces

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
PROGRESS = ("epoch", "step")
ALIGNMENT = 64  # of a tensor in its file, as torch has it


def load_pickle(path: Path) -> Any:
    """What torch.save wrote; UserError where it is damaged, or more than tensors and numbers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there are no weights {path}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds no readable weights: it is damaged, or holds more than tensors and numbers, which is not run"
        ) from None
    except Exception as error:
        raise UserError(
            f"{path} holds no readable weights: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None


class PickleFile(TensorFile):
    """An open `.pt` file that holds a flat mapping: `file[name]` reads that tensor alone. UserError where it is no such file.

    progress: `epoch` and `step`, where the file says them as numbers; they are no weights.
    """

    def _index(self) -> dict[str, Entry]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with (
            FakeTensorMode()
        ):  # reads the pickle alone; the storages know where they are in the file
            content = load_pickle(self.path)
        if not isinstance(content, Mapping):
            raise UserError(
                f"{self.path} holds a {type(content).__name__}, not a mapping of names to tensors"
            )
        self.progress = {
            name: content[name] for name in PROGRESS if isinstance(content.get(name), int)
        }
        tensors = {
            name: value
            for name, value in content.items()
            if isinstance(value, Tensor) and name not in PROGRESS
        }
        if not tensors:
            raise UserError(f"{self.path} holds no tensors")
        return {name: self._entry(name, tensor) for name, tensor in tensors.items()}

    def _entry(self, name: str, tensor: Tensor) -> Entry:
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or tensor.dtype not in STORAGES or not tensor.is_contiguous():
            raise UserError(
                f"{self.path} holds {name} in a form that cannot be read in pieces: load it and save it anew with torch.save"
            )
        start = offset + tensor.storage_offset() * tensor.itemsize
        return Entry(tensor.dtype, tuple(tensor.shape), start, start + tensor.nbytes)


def open_weights(path: Path) -> TensorFile:
    return TensorFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def write_pickle(
    path: Path, shapes: Shapes, tensors: Iterator[Tensor], same: Mapping[str, str]
) -> None:
    """Writes tensors as they come, whole or in pieces, in the order of `shapes`, as torch.save would a mapping of them.

    same: second names of tensors, with the first.
    """
    stubs = {
        name: Stub(str(key), dtype, shape)
        for key, (name, (dtype, shape)) in enumerate(shapes.items())
    }
    content = BytesIO()
    Pickler(content, protocol=2).dump(stubs | {name: stubs[first] for name, first in same.items()})
    with open(path, "wb") as file:
        with ZipFile(file, "w") as archive:
            archive.writestr(ZipInfo("archive/data.pkl"), content.getvalue())
            archive.writestr(ZipInfo("archive/byteorder"), sys.byteorder)
            for stub in stubs.values():
                info = ZipInfo(f"archive/data/{stub.key}")
                info.file_size = stub.count * stub.dtype.itemsize
                zip64 = info.file_size > 2**31
                begin = file.tell() + 30 + len(info.filename) + (20 if zip64 else 0) + 4
                info.extra = (
                    b"FB" + (-begin % ALIGNMENT).to_bytes(2, "little") + bytes(-begin % ALIGNMENT)
                )
                with archive.open(info, "w", force_zip64=zip64) as place:
                    write_pieces(place, stub.dtype, stub.count, tensors)
            archive.writestr(ZipInfo("archive/version"), "3\n")
        assert next(tensors, None) is None, "more tensors than shapes"
        file.flush()
        os.fsync(file.fileno())


class Stub:
    """Is pickled as a tensor whose numbers are in the storage `key`."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key, self.dtype, self.shape, self.count = key, dtype, shape, prod(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (
            Storage(self),
            0,
            self.shape,
            strides,
            False,
            OrderedDict(),
        )


class Storage:
    def __init__(self, stub: Stub) -> None:
        self.stub = stub


class Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        """What torch's unpickler takes for a storage."""
        if isinstance(thing, Storage):
            return "storage", STORAGES[thing.stub.dtype], thing.stub.key, "cpu", thing.stub.count
        return None
