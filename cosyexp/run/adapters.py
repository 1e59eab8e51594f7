"""Low-rank adapters: files that hold what a training changed of a base (Hu et al. 2021, "LoRA").

A file has the tensors and the names of peft's `adapter_model.safetensors`, and its metadata name
the base by path and SHA-256. Whoever reads it as weights gets those of the base, changed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.documents import Fields, parse_json
from cosyexp.run.tensors import TensorFile, read_tensors

ADAPTER_CONFIG = "adapter_config.json"  # as peft names it
NOTE = "cosyexp_adapter"  # key of the note in the metadata
PREFIX = "base_model.model."  # of all names in peft's files


@dataclass(frozen=True)
class AdapterNote:
    """What the metadata of an adapter say; equal for one base, wherever it is.

    Attributes:
        base: file of the base weights.
        sha256: of that file.
        scaling: factor of the product of the two factors of a change.
    """

    base: str = field(compare=False)
    sha256: str
    scaling: float

    def metadata(self) -> dict[str, str]:
        """Returns the note as metadata of a safetensors file."""
        return {NOTE: json.dumps(asdict(self))}


@dataclass(frozen=True)
class Adapter:
    """The adapter that a training attached to a network.

    Attributes:
        note: for the metadata of its files.
        config: content of peft's `adapter_config.json`.
    """

    note: AdapterNote
    config: Mapping[str, Any]


def adapter_note(path: Path) -> AdapterNote | None:
    """Returns the note of a file of weights; None if it is no adapter.

    Raises:
        UserError: the file is missing or damaged.
    """
    if path.suffix != ".safetensors":
        return None
    with TensorFile(path) as file:
        return note_in(file)


def note_in(file: TensorFile) -> AdapterNote | None:
    """Returns the note of an open file; None if it is no adapter."""
    if NOTE not in file.metadata:
        return None
    fields = Fields(parse_json(file.metadata[NOTE], file.path), file.path)
    return AdapterNote(fields.text("base"), fields.text("sha256"), fields.number("scaling"))


def find_base(path: Path, note: AdapterNote) -> Path:
    """Returns the file of the base of an adapter.

    It is where the training read it, or a file of that name next to the adapter or in its run.

    Args:
        path: file of the adapter.
        note: its note.

    Raises:
        UserError: it is missing, or holds other weights.
    """
    recorded, run = Path(note.base), path.parents[min(2, len(path.parents) - 1)]
    places = (recorded, path.parent / recorded.name, run / recorded.name)
    found = [place for place in places if place.is_file()]
    for place in found:
        if sha256_of(place) == note.sha256:
            return place
    if found:
        raise UserError(
            f"{path} is an adapter to other weights than those in {found[0]}, whose SHA-256 is not "
            f"{note.sha256[:16]}...: put the right file there, or as {places[-1]}"
        )
    raise UserError(
        f"{path} is an adapter to {recorded}, which is missing: put that file, or a link to it, "
        f"there or at {places[-1]}"
    )


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, which is read again only if it changes."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    return file_hash(path)


def merged(base: Mapping[str, Tensor], path: Path, note: AdapterNote) -> dict[str, Tensor]:
    """Returns the weights of a base with an adapter merged, in fp32.

    W + s B A, or with DoRA m (W + s B A) / |W + s B A|, norms by row (Liu et al. 2024, "DoRA").

    Args:
        base: weights of the base by name.
        path: file of the adapter.
        note: its note.

    Raises:
        UserError: the tensors of the adapter do not fit the base.
    """
    adapter, weights = read_tensors(path), dict(base)
    suffix = ".lora_A.weight"
    modules = [name.removesuffix(suffix) for name in adapter if name.endswith(suffix)]
    left = set(adapter)
    for module in modules:
        name = f"{module.removeprefix(PREFIX)}.weight"
        down, up = adapter[module + suffix], adapter.get(f"{module}.lora_B.weight")
        magnitude = adapter.get(f"{module}.lora_magnitude_vector")
        left -= {module + suffix, f"{module}.lora_B.weight", f"{module}.lora_magnitude_vector"}
        weight = base.get(name)
        if up is None or weight is None or not _fit(weight, down, up, magnitude):
            raise UserError(f"{path} does not fit its base in {name}: choose other weights")
        weight = weight.float() + note.scaling * (up.float() @ down.float())
        if magnitude is not None:
            weight = weight * (magnitude.float() / torch.linalg.norm(weight, dim=1))[:, None]
        weights[name] = weight
    if left or not modules:
        raise UserError(f"{path} is not an adapter that cosyexp reads: choose other weights")
    return weights


def _fit(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor | None) -> bool:
    """Returns whether the factors of a change and the norms of its rows have the right shapes."""
    if not (weight.is_floating_point() and weight.layout is torch.strided and weight.dim() == 2):
        return False
    outputs, inputs = weight.shape
    rank = down.numel() // max(inputs, 1)
    return (down.shape, up.shape) == ((rank, inputs), (outputs, rank)) and (
        magnitude is None or magnitude.shape == (outputs,)
    )


def stored_name(parameter: str) -> str:
    """Returns the name of a parameter of an adapter in peft's files."""
    module, _, kind = parameter.rpartition(".lora_")
    kind = kind.split(".")[0]
    return f"{PREFIX}{module}.lora_{kind}" + ("" if kind == "magnitude_vector" else ".weight")


def parameter_name(stored: str) -> str:
    """Returns the name that a parameter of an adapter has in its network; see `stored_name`."""
    module, _, kind = stored.removeprefix(PREFIX).rpartition(".lora_")
    return f"{module}.lora_{kind.split('.')[0]}.default.weight"
