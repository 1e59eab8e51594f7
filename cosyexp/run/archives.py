"""Checks a file of `torch.save` before torch reads it, from its directory and its pickle alone.

Format: a zip archive. Its `data.pkl` is a pickle that refers, for each tensor, to one of the
storages `data/0`, `data/1`, ... in the archive. torch trusts the sizes in both. Here a storage must
be stored whole and uncompressed, must not share bytes with another, and a tensor must lie in its
storage without repeating its numbers, so that reading takes no more memory than the file has bytes.
The pickle may only name what makes tensors: `torch.load(weights_only=True)` allows a bit more.
"""

import os
import pickle
import struct
from collections import OrderedDict
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch

from cosyexp.errors import UserError
from cosyexp.run.documents import DEPTH, open_regular

PICKLE_SIZE = 2**23  # bytes of data.pkl
# What `weights_only` reads, without what makes objects by a class of the pickle's choice.
OPCODES = """PROTO STOP MARK GLOBAL REDUCE BUILD APPEND APPENDS SETITEM SETITEMS TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET NONE NEWFALSE NEWTRUE BININT BININT1 BININT2
    BINFLOAT BINUNICODE SHORT_BINSTRING LONG1 BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT"""
UNREADABLE = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError,
              RuntimeError, TypeError, ValueError, struct.error)  # fmt: skip
SPECIAL = ("sparse", "meta", "nested")


class Storage(NamedTuple):
    """A storage: type of its numbers (None: bytes), key in the archive, and number of them."""

    dtype: torch.dtype | None
    key: str
    numel: int


class Stub(NamedTuple):
    """A tensor of the pickle, without its numbers; strides and offset count numbers."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the numbers lie one after another."""
        wanted = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return all(
            size == 1 or stride == want
            for size, stride, want in zip(self.shape, self.strides, wanted, strict=True)
        )


class Special(NamedTuple):
    """A tensor without plain numbers, such as a sparse one; its maker in `torch._utils`."""

    maker: str


class Archive(NamedTuple):
    """What a file of `torch.save` holds.

    Attributes:
        content: its content, with stubs for tensors.
        offsets: where each storage begins in the file, by key.
    """

    content: Any
    offsets: dict[str, int]


def scan_archive(path: Path) -> Archive:
    """Reads the directory and the pickle of a file of `torch.save`, and checks all sizes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: torch could not read it safely.
    """
    with open_regular(path) as file:
        try:
            return _scan(file, path)
        except pickle.UnpicklingError:
            raise UserError(
                f"cannot load weights from {path}, which is damaged or holds objects other than "
                f"tensors and numbers (these could run code): save it again as a plain state dict"
            ) from None
        except UserError:
            raise
        except BadZipFile:
            raise _unusable(path, "it is not a zip archive, as torch.save writes it") from None
        # A damaged pickle or directory can lead to any of these.
        except UNREADABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _unusable(path, reason) from None


def _scan(file: Any, path: Path) -> Archive:
    end = os.fstat(file.fileno()).st_size
    with ZipFile(file) as archive:
        entries = archive.infolist()
    if any(e.compress_type != ZIP_STORED or e.compress_size != e.file_size for e in entries):
        raise _unusable(path, "its entries are compressed")
    starts = {entry.filename: _start(file, entry) for entry in entries}
    if len({name.lower() for name in starts}) != len(entries):  # torch ignores the case
        raise _unusable(path, "two of its entries have one name")
    reached = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < reached:
            raise _unusable(path, "its entries share bytes")
        reached = starts[entry.filename] + entry.file_size
    if reached > end:
        raise _unusable(path, "it is cut short")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > PICKLE_SIZE:
        raise _unusable(path, "it has not one data.pkl of a usable size")
    root = pickles[0].filename.removesuffix("data.pkl")
    file.seek(starts[pickles[0].filename])
    reader = _Reader(file.read(pickles[0].file_size))
    content = reader.load()
    begin = f"{root}data/"
    sizes = {entry.filename.removeprefix(begin): entry.file_size for entry in entries}
    for storage in reader.storages:
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        if storage.numel * itemsize != sizes.get(storage.key):
            raise _unusable(path, f"storage {storage.key} has another size than its numbers")
    for stub in reader.stubs:
        _check_stub(stub, path)
    return Archive(content, {name.removeprefix(begin): start for name, start in starts.items()})


def _start(file: Any, entry: ZipInfo) -> int:
    """Returns where the content of an entry begins, after its own header in the file."""
    file.seek(entry.header_offset)
    header = file.read(30)
    signature, name, extra = struct.unpack("<4s22xHH", header)
    if signature != b"PK\x03\x04":
        raise BadZipFile
    return int(entry.header_offset + 30 + name + extra)


def _check_stub(stub: Stub, path: Path) -> None:
    numbers = [stub.offset, *stub.shape, *stub.strides]
    if len(stub.shape) != len(stub.strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _unusable(path, "a tensor has an impossible shape")
    itemsize = 1 if stub.storage.dtype is None else stub.storage.dtype.itemsize
    held = stub.storage.numel * itemsize // stub.dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(stub.shape, stub.strides, strict=True))
    if prod(stub.shape) and (stub.offset + last >= held or prod(stub.shape) > held):
        raise _unusable(path, "a tensor has more numbers than its storage")


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(
        f"cannot load weights from {path} ({reason}): restore the file, or save it again with "
        f"torch.save"
    )


def _codes() -> list[int]:
    return [getattr(pickle, name)[0] for name in OPCODES.split()]


class _Kind(NamedTuple):
    """A class of storages: the type of their numbers; None: bytes."""

    dtype: torch.dtype | None


class _Reader(pickle._Unpickler):
    """Reads a pickle of tensors as stubs; nothing that it names is called."""

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _codes()}

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content))
        self.storages: list[Storage] = []
        self.stubs: list[Stub] = []

    def load_build(self) -> None:
        """Leaves the attributes of an object out."""
        self.stack.pop()  # type: ignore[attr-defined]

    def load_mark(self) -> None:
        """Begins a list, a mapping or a tuple.

        Raises:
            ValueError: it is inside of too many others.
        """
        if len(self.metastack) > DEPTH:  # type: ignore[attr-defined]
            raise ValueError("it is nested too deep")
        super().load_mark()  # type: ignore[misc]

    dispatch[pickle.MARK[0]] = load_mark  # type: ignore[assignment]
    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name of the pickle.

        Raises:
            UnpicklingError: it makes neither tensors nor plain values.
        """
        full, value = f"{module}.{name}", getattr(torch, name, None)
        makers: dict[str, Any] = {
            "collections.OrderedDict": lambda: OrderedDict(),
            "torch.Size": lambda sizes: sizes,
            "torch.serialization._get_layout": lambda layout: layout,
            "torch.Tensor": "torch.Tensor",
            # tensors that have attributes, as those of DeepSpeed
            "torch._tensor._rebuild_from_type_v2": lambda maker, kind, values, state: maker(
                *values
            ),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
        }
        if full in makers:
            return makers[full]
        if module == "torch" and isinstance(value, torch.dtype):
            return value
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _Kind(torch.storage._storage_type_to_dtype_map().get(name))
        if module == "torch._utils" and any(word in name for word in SPECIAL):
            return lambda *_: Special(name)
        raise pickle.UnpicklingError(full)

    def persistent_load(self, pid: Any) -> Storage:
        """Returns the storage that a reference names.

        Raises:
            ValueError: it cannot be one.
        """
        _, kind, key, _, count = pid
        if not isinstance(kind, _Kind) or type(count) is not int or type(key) is not str:
            raise ValueError("it refers to something else than storages")
        self.storages.append(Storage(kind.dtype, key, count))
        return self.storages[-1]

    def _tensor(self, storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Stub:
        return self._typed_tensor(storage, offset, shape, strides, None, None, storage.dtype)

    def _typed_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
    ) -> Stub:
        dtype = rest[2]
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            raise ValueError("a tensor has no storage or no type")
        self.stubs.append(Stub(storage, dtype, offset, tuple(shape), tuple(strides)))
        return self.stubs[-1]
