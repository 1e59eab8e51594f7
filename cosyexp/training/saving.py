"""Saves and restores the whole state of a training: weights, averages, engine and trainer."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosyexp.config.names import ADAPTER
from cosyexp.errors import UserError
from cosyexp.objectives.base import Trainable
from cosyexp.run.adapters import ADAPTER_CONFIG, Adapter, parameter_name, stored_name
from cosyexp.run.checkpoint import Checkpoint, Checkpoints
from cosyexp.run.files import create, make_folder, write_json
from cosyexp.run.folders import remove_tree
from cosyexp.run.pickles import load_pickle
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.training.engines.base import Engine

OPTIMIZER = "trainer/optimizer"  # folder for optimizer state that an engine writes itself


def save(
    checkpoints: Checkpoints,
    engine: Engine,
    trainables: Mapping[str, Trainable],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint and returns its folder; all ranks call it.

    Rank 0 writes the weights and the trainer's state, and each rank the state of its engine, if
    any.

    Args:
        checkpoints: the checkpoints of the run.
        engine: the engine of this rank.
        trainables: the trainables by name.
        state: the trainer's state, of tensors and plain values.
        meta: the content of the checkpoint's `meta.yaml`.

    Raises:
        OSError: a rank could not write its files. It is raised on all ranks, and nothing is left of
            the checkpoint.
    """
    writing, begun = Writing(engine), ""
    with writing:
        if engine.rank == 0:
            begun = str(checkpoints.begin(meta["step"]))
    folder = Path(writing.gather(begun)[0])
    try:
        for name, trainable in trainables.items():
            with writing:
                path, adapter = folder / weights_file(name, trainable), trainable.adapter
                write_weights(path, engine.weights(name), engine.rank, adapter)
                if adapter and engine.rank == 0:
                    write_json(folder / ADAPTER_CONFIG, adapter.config)
        for name, mean in engine.weight_averages().items():
            with writing:
                write_weights(folder / f"{name}.safetensors", mean, engine.rank, adapter)
        with writing:
            engine_state = engine.save_state(folder / OPTIMIZER)
            if engine.rank == 0 or engine_state:
                own = state if engine.rank == 0 else {}
                _write_state(folder, engine, {"engine": engine_state, **own})
        writing.gather()
        with writing:
            if engine.rank == 0:
                checkpoints.commit(folder, meta)
        writing.gather()
    except OSError:
        if engine.rank == 0:
            remove_tree(folder)
        raise
    return folder.with_suffix("")


def _write_state(folder: Path, engine: Engine, state: Mapping[str, Any]) -> None:
    content = io.BytesIO()
    torch.save({"optimizer_layout": engine.optimizer_layout, **state}, content)
    make_folder(folder / "trainer")
    with create(folder / "trainer" / f"rank_{engine.rank}.pt") as file:
        file.write(content.getbuffer())


class Writing:
    """A context manager that keeps a failure to write until `gather` tells it to all ranks.

    The other ranks would wait for one that left at once.

    Args:
        engine: of this rank.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: OSError | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, OSError):
            self.failure = self.failure or error
        return isinstance(error, OSError)

    def gather(self, value: str = "") -> list[str]:
        """Returns a value of each rank, once all ranks are here.

        Raises:
            OSError: one of them failed; raised on all.
        """
        ranks = self.engine.all_gather((self.failure, value))
        if failure := next((failure for failure, _ in ranks if failure), None):
            raise failure
        return [value for _, value in ranks]


def weights_file(name: str, trainable: Trainable) -> str:
    """Returns the name of the file of a trainable's weights in a checkpoint."""
    return ADAPTER if trainable.adapter else f"{name}.safetensors"


def write_weights(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    rank: int,
    adapter: Adapter | None = None,
) -> None:
    """Writes tensors to a file on rank 0.

    All ranks iterate over the tensors, as each may hold a part of them that has to be gathered.

    Args:
        path: the `.safetensors` file.
        tensors: names and full tensors.
        rank: of this process.
        adapter: that the tensors belong to; None if they are of a whole network.
    """
    kept = {name: tensor.cpu() for name, tensor in tensors if rank == 0}
    if rank > 0:
        return
    if adapter is None:
        save_tensors(path, kept)
    else:
        named = {stored_name(name): tensor for name, tensor in kept.items()}
        save_tensors(path, named, adapter.note.metadata())


def restore(
    checkpoint: Checkpoint, engine: Engine, trainables: Mapping[str, Trainable]
) -> dict[str, Any]:
    """Restores the weights and the engine's state from a checkpoint; all ranks call it.

    Args:
        checkpoint: the checkpoint.
        engine: the engine of this rank, after its `setup`.
        trainables: the trainables by name.

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
    folder = checkpoint.path
    networks = {
        name: read_state(folder / weights_file(name, trainable), trainable.adapter)
        for name, trainable in trainables.items()
    }
    adapter = list(trainables.values())[-1].adapter
    means = {
        name: read_state(folder / f"{name}.safetensors", adapter)
        for name in engine.weight_averages()
    }
    engine.load(networks, means, engine_state, checkpoint.path / OPTIMIZER)
    return dict(first)


def read_state(path: Path, adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """Returns the tensors that `write_weights` wrote, under their names in the network."""
    tensors = read_tensors(path)
    return {parameter_name(n): t for n, t in tensors.items()} if adapter else tensors


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
