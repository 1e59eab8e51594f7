"""What a checkpoint of training holds, beside the weights: how each engine and the trainer go on."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import Checkpoint, Checkpoints
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.training.engines.base import Engine

OPTIMIZER = "trainer/optimizer"  # what engines write themselves


def save(
    checkpoints: Checkpoints,
    engine: Engine,
    trainables: Iterable[str],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Rank 0 writes the weights and the trainer's state, every rank what its engine must keep."""
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
        (folder / "trainer").mkdir(exist_ok=True)
        (folder / "trainer" / f"rank_{engine.rank}.pt").write_bytes(content.getbuffer())
    engine.all_gather(None)  # all files are there
    if engine.rank == 0:
        checkpoints.commit(folder, meta)
    engine.all_gather(None)


def write_weights(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], rank: int) -> None:
    """Every rank iterates, as it may hold parts of the tensors; rank 0 keeps and writes them."""
    kept = {name: tensor.cpu() for name, tensor in tensors if rank == 0}
    if rank == 0:
        save_tensors(path, kept)


def restore(checkpoint: Checkpoint, engine: Engine, trainables: Iterable[str]) -> dict[str, Any]:
    """Gives the engine back its weights and state, and returns the trainer's."""
    first = torch.load(
        checkpoint.path / "trainer" / "rank_0.pt", map_location="cpu", weights_only=True
    )
    if (layout := first["optimizer_layout"]) != engine.optimizer_layout:
        raise UserError(
            f"the optimizer state of {checkpoint.path} is {layout}, and this run wants it {engine.optimizer_layout}: "
            f"resume it as it was begun, or start from its weights by init_from= and another run_dir="
        )
    own = checkpoint.path / "trainer" / f"rank_{engine.rank}.pt"
    engine_state = (
        torch.load(own, map_location="cpu", weights_only=True)["engine"]
        if own.exists()
        else first["engine"]
    )
    networks, means = (
        {name: read_tensors(checkpoint.path / f"{name}.safetensors") for name in names}
        for names in (trainables, engine.weight_averages())
    )
    engine.load(networks, means, engine_state, checkpoint.path / OPTIMIZER)
    return dict(first)


def refuse_other_data(run: object, expected: str, found: str) -> None:
    if expected != found:
        raise UserError(
            f"the training data are not those that {run} was begun with ({found} then, {expected} now): "
            f"restore them, or give another run_dir="
        )
