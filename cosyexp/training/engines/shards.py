"""Saves and loads optimizer state that is sharded over ranks, with torch's distributed checkpoint.

Every rank writes its own shards. The files are safetensors, so reading them runs no code. A reader
takes the parts that it needs: FSDP on any number of ranks its shards, other engines whole tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cosyexp.run.files import make_folder


def save_shards(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the tensors of an optimizer's `state_dict`; all ranks call it.

    Returns:
        The `state_dict` without its tensors, for `load_shards`.

    Raises:
        OSError: a rank could not write its shards; raised on all ranks.
    """
    make_folder(folder)
    tensors, rest = {}, {}
    for i, entry in state["state"].items():
        tensors.update(
            {f"{i}.{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
        )
        rest[i] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, OSError) else OSError(str(cause)) from None
    return {**state, "state": rest}


def load_shards(
    folder: Path, state: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> dict[str, Any]:
    """Reads the tensors that `save_shards` wrote; all ranks call it.

    Args:
        folder: the folder that they were written to.
        state: what `save_shards` returned.
        parameters: the optimizer's parameters, in order; the tensors are sharded as they are.

    Returns:
        The complete `state_dict`.
    """
    tensors: dict[str, Any] = {}
    reader = HuggingFaceStorageReader(str(folder))
    metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, tensor in metadata.items():
        parameter, dtype = parameters[int(name.split(".")[0])], tensor.properties.dtype
        same_shape = tensor.size == parameter.shape
        tensors[name] = (
            torch.zeros_like(parameter, dtype=dtype)
            if same_shape
            else torch.zeros(tensor.size, dtype=dtype)
        )
    with catch_warnings(action="ignore"):  # torch warns if there is no process group
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    entries = {i: dict(rest) for i, rest in state["state"].items()}
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        entries[int(i)][key] = tensor
    return {**state, "state": entries}
