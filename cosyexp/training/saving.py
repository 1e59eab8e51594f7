"""Saves and restores the whole state of a training: weights, averages, engine and trainer."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import Checkpoint, Checkpoints
from cosyexp.run.files import create, make_folder
from cosyexp.run.pickles import load_pickle
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.training.engines.base import Engine

OPTIMIZER = "trainer/optimizer"  # folder for optimizer state that an engine writes itself


def save(
    checkpoints: Checkpoints,
    engine: Engine,
    trainables: Iterable[str],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint and returns its folder; all ranks call it.

    Rank 0 writes the weights and the trainer's state, and each rank the state of its engine, if
    any.

    Args:
        checkpoints: the checkpoints of the run.
        engine: the engine of this rank.
        trainables: names of the trainables.
        state: the trainer's state, of tensors and plain values.
        meta: the content of the checkpoint's `meta.yaml`.
    """
    folder = Path(
        engine.all_gather(str(checkpoints.begin(meta["step"])) if engine.rank == 0 else "")[0]
    )
    for name in trainables:
        write_weights(folder / f"{name}.safetensors", engine.weights(name), engine.rank)
    for name, mean in engine.weight_averages().items():
        write_weights(folder / f"{name}.safetensors", mean, engine.rank)
    engine_state = engine.save_state(folder / OPTIMIZER)
    if engine.rank == 0 or engine_state:
        content = io.BytesIO()
        torch.save(
            {
                "engine": engine_state,
                "optimizer_layout": engine.optimizer_layout,
                **(state if engine.rank == 0 else {}),
            },
            content,
        )
        make_folder(folder / "trainer")
        with create(folder / "trainer" / f"rank_{engine.rank}.pt") as file:
            file.write(content.getbuffer())
    engine.all_gather(None)  # waits until every rank has written its files
    if engine.rank == 0:
        checkpoints.commit(folder, meta)
    engine.all_gather(None)
    return folder.with_suffix("")


def write_weights(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], rank: int) -> None:
    """Writes tensors to a file on rank 0.

    All ranks iterate over the tensors, as each may hold a part of them that has to be gathered.

    Args:
        path: the `.safetensors` file.
        tensors: names and full tensors.
        rank: of this process.
    """
    kept = {name: tensor.cpu() for name, tensor in tensors if rank == 0}
    if rank == 0:
        save_tensors(path, kept)


def restore(checkpoint: Checkpoint, engine: Engine, trainables: Iterable[str]) -> dict[str, Any]:
    """Restores the weights and the engine's state from a checkpoint; all ranks call it.

    Args:
        checkpoint: the checkpoint.
        engine: the engine of this rank, after its `setup`.
        trainables: names of the trainables.

    Returns:
        The trainer's state, as given to `save`.

    Raises:
        UserError: another engine saved the optimizer state, in a layout that this one cannot read.
    """
    first = load_pickle(checkpoint.path / "trainer" / "rank_0.pt")
    if (layout := first["optimizer_layout"]) != engine.optimizer_layout:
        raise UserError(
            f"the optimizer state of {checkpoint.path} is {layout}, but this engine needs it "
            f"{engine.optimizer_layout}: resume with the old engine and number of ranks, or start "
            f"from the weights with init_from= and another run_dir="
        )
    own = checkpoint.path / "trainer" / f"rank_{engine.rank}.pt"
    engine_state = load_pickle(own)["engine"] if own.exists() else first["engine"]
    networks, means = (
        {name: read_tensors(checkpoint.path / f"{name}.safetensors") for name in names}
        for names in (trainables, engine.weight_averages())
    )
    engine.load(networks, means, engine_state, checkpoint.path / OPTIMIZER)
    return dict(first)


def refuse_other_data(run: object, expected: str, found: str) -> None:
    """Compares the fingerprint of the training data with that of a checkpoint.

    Args:
        run: the run directory, for the error message.
        expected: the fingerprint of the data of this start.
        found: the fingerprint in the checkpoint.

    Raises:
        UserError: they differ.
    """
    if expected != found:
        raise UserError(
            f"the training data of {run} have changed ({found} at its last checkpoint, {expected} "
            f"now): restore them, or give another run_dir="
        )
