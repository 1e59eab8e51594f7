"""Optimizer state that lies in parts on the ranks, by torch's distributed checkpoint: every rank writes its own part.

The files are safetensors, so nothing in them is run on reading. Whoever reads takes the parts that it needs: an FSDP run of any
number of ranks its shards, any other engine the whole tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def save_shards(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the tensors of an optimizer's `state_dict`; returns what else is in it. All ranks call it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, rest = {}, {}
    for i, entry in state["state"].items():
        tensors.update(
            {f"{i}.{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
        )
        rest[i] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    return {**state, "state": rest}


def load_shards(
    folder: Path, state: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> dict[str, Any]:
    """The `state_dict` that was saved, with its tensors laid out as this run's parameters are. All ranks call it."""
    tensors: dict[str, Any] = {}
    reader = HuggingFaceStorageReader(str(folder))
    about: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, tensor in about.items():
        parameter, dtype = parameters[int(name.split(".")[0])], tensor.properties.dtype
        like_it = tensor.size == parameter.shape
        tensors[name] = (
            torch.zeros_like(parameter, dtype=dtype)
            if like_it
            else torch.zeros(tensor.size, dtype=dtype)
        )
    with catch_warnings(action="ignore"):  # that it reads as one process, where this is one
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    entries = {i: dict(rest) for i, rest in state["state"].items()}
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        entries[int(i)][key] = tensor
    return {**state, "state": entries}
