"""Reads and writes files of `torch.save` tensor by tensor, without running any pickled code.

Format: an uncompressed zip archive. Its `data.pkl` is a pickle that refers, for each tensor, to one
of the storages `data/0`, `data/1`, ... in the archive.
"""

import logging
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
from cosyexp.run.archives import Special, Stub, scan_archive
from cosyexp.run.files import create
from cosyexp.run.tensors import Entry, Shapes, TensorFile, write_pieces

log = logging.getLogger(__name__)
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
# keys under which a checkpoint may nest its state dict
WRAPPINGS = ("module", "state_dict", "model", "model_state_dict")
# of all names in a state dict: of DistributedDataParallel, and of a moving average of a model
PREFIXES = ("module.", "ema_model.")
ALIGNMENT = 64  # bytes; storages start at multiples of it, as in torch.save


def load_pickle(path: Path) -> Any:
    """Returns the content of a file of `torch.save`, on the CPU.

    Raises:
        UserError: the file is missing, damaged, or holds objects other than tensors and numbers.
    """
    try:
        scan_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist: check the path") from None
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load weights from {path} ({reason}): restore the file, or create it again"
        ) from None


def state_dict_in(content: Any, path: Path, quiet: bool = False) -> dict[str, Any]:
    """Returns the state dict in the content of a checkpoint.

    It may be nested under a key of WRAPPINGS, and all its names may begin with one of PREFIXES,
    which is removed. Integers and strings beside the tensors are left out.

    Args:
        content: what the file holds; tensors may be stubs.
        path: the file, for messages.
        quiet: do not log where they are.

    Raises:
        UserError: there are no tensors where they are looked for, or in several places.
    """
    mapping = content
    while isinstance(mapping, Mapping):
        nested = [key for key in WRAPPINGS if isinstance(mapping.get(key), Mapping)]
        if not nested:
            break
        if len(nested) > 1:
            raise UserError(
                f"{path} holds weights under {' and under '.join(nested)}: save one of these as a "
                f"plain state dict"
            )
        level = logging.DEBUG if quiet else logging.INFO
        log.log(level, "%s: taking the weights under %s", path, *nested)
        mapping = mapping[nested[0]]
    if not isinstance(mapping, Mapping):
        raise UserError(
            f"{path} holds a {type(mapping).__name__}, not a mapping of names to tensors: save a "
            f"state dict instead"
        )
    tensors = {
        str(name): value
        for name, value in mapping.items()
        if isinstance(name, str)
        and isinstance(value, Tensor | Stub | Special)
        and name not in PROGRESS
    }
    if not tensors:
        keys = ", ".join(str(key) for key in list(mapping)[:8]) or "none"
        raise UserError(
            f"{path} holds no tensors at the top or under {', '.join(WRAPPINGS)} (its keys are "
            f"{keys}): choose another file, or save its state dict"
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


class PickleFile(TensorFile):
    """An open `.pt` file of a state dict; `file[name]` reads that tensor only.

    The attribute `progress` holds the integers `epoch` and `step` that a training checkpoint of the
    original holds in addition to its tensors; it is empty for other files.

    Raises:
        UserError: the file does not hold a mapping of names to tensors, or cannot be read in
            pieces.
    """

    def _index(self) -> dict[str, Entry]:
        content, offsets = scan_archive(self.path)
        tensors = state_dict_in(content, self.path)
        self.progress = {
            name: content[name] for name in PROGRESS if isinstance(content.get(name), int)
        }
        return {name: self._entry(name, stub, offsets) for name, stub in tensors.items()}

    def _entry(self, name: str, stub: Stub | Special, offsets: Mapping[str, int]) -> Entry:
        if isinstance(stub, Special) or stub.dtype not in STORAGES or not stub.contiguous:
            raise UserError(
                f"{self.path} holds {name} in a layout that cannot be read in pieces: load the "
                f"file and save it again with torch.save"
            )
        start = offsets[stub.storage.key] + stub.offset * stub.dtype.itemsize
        return Entry(stub.dtype, stub.shape, start, start + prod(stub.shape) * stub.dtype.itemsize)


def open_weights(path: Path) -> TensorFile:
    """Opens a `.safetensors` file, or one of `torch.save`, to read single tensors."""
    return TensorFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def write_pickle(
    path: Path, shapes: Shapes, tensors: Iterator[Tensor], same: Mapping[str, str]
) -> None:
    """Writes a mapping of tensors as `torch.save` does, without holding all of them in memory.

    Args:
        path: the file; it is synced to disk.
        shapes: dtype and shape of each tensor, by name.
        tensors: the tensors in the order of `shapes`, whole or as consecutive flat pieces.
        same: additional names of tensors, each with the name that the tensor has in `shapes`.
    """
    stubs = {
        name: Placeholder(str(key), dtype, shape)
        for key, (name, (dtype, shape)) in enumerate(shapes.items())
    }
    content = BytesIO()
    Pickler(content, protocol=2).dump(stubs | {name: stubs[first] for name, first in same.items()})
    with create(path) as file:
        with ZipFile(file, "w") as archive:
            archive.writestr(ZipInfo("archive/data.pkl"), content.getvalue())
            archive.writestr(ZipInfo("archive/byteorder"), sys.byteorder)
            for stub in stubs.values():
                info = ZipInfo(f"archive/data/{stub.key}")
                info.file_size = stub.count * stub.dtype.itemsize
                zip64 = info.file_size > 2**31
                # The header: 30 bytes, name, zip64 sizes, and 4 bytes of the extra field "FB".
                begin = file.tell() + 30 + len(info.filename) + (20 if zip64 else 0) + 4
                padding = -begin % ALIGNMENT
                info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
                with archive.open(info, "w", force_zip64=zip64) as storage:
                    write_pieces(storage, stub.dtype, stub.count, tensors)
            archive.writestr(ZipInfo("archive/version"), "3\n")
        assert next(tensors, None) is None, "more tensors than shapes"


class Placeholder:
    """A placeholder that is pickled as a contiguous tensor, whose numbers are in storage `key`."""

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
    """A placeholder that is pickled as the storage of a tensor."""

    def __init__(self, stub: Placeholder) -> None:
        self.stub = stub


class Pickler(pickle.Pickler):
    """Pickles `Storage` placeholders as references to the storages of the archive."""

    def persistent_id(self, thing: Any) -> Any:
        """Returns the reference that torch's unpickler resolves to a storage."""
        if isinstance(thing, Storage):
            return "storage", STORAGES[thing.stub.dtype], thing.stub.key, "cpu", thing.stub.count
        return None
