"""Run directories for the tests, with checkpoints but without a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from cosyexp.config import TrainConfig, parse, to_dict
from cosyexp.run.checkpoint import Checkpoint
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import save_tensors

SMALLEST = {
    "model": {"name": "llm"},
    "data": {"train": "train.list", "valid": None, "dir": None},
    "run_dir": "unused",
}


def smallest_config(values: Mapping[str, Any] | None = None) -> TrainConfig:
    """Returns a config that can be stored, though not trained, with some values changed."""
    merged = OmegaConf.merge(SMALLEST, dict(values or {}))
    return parse(TrainConfig, OmegaConf.to_container(merged))  # type: ignore[arg-type]


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    """Returns a copy of a config with other top-level values."""
    return parse(TrainConfig, {**to_dict(config), **values})


def make_run(path: Path, config: TrainConfig | None = None) -> RunDirectory:
    """Makes a run directory without checkpoints; by default that of an llm."""
    run = RunDirectory(path)
    run.write_config(smallest_config() if config is None else config, [])
    return run


def add(
    run: RunDirectory,
    step: int,
    losses: Mapping[str, float] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    **others: Mapping[str, Tensor],
) -> Checkpoint:
    """Adds a checkpoint to a run.

    Args:
        step: the step of the checkpoint.
        losses: its validation losses, if it was validated.
        tensors: the weights of the model; by default 4 numbers, all equal to `step`.
        others: more files of weights, by name.
    """
    folder, model = run.checkpoints.begin(step), run.config().model.name
    weights = tensors or {"weight": torch.full((4,), float(step))}
    for name, content in {model: weights, **others}.items():
        save_tensors(folder / f"{name}.safetensors", content)
    return run.checkpoints.commit(
        folder,
        {"step": step, "epoch": 0, "samples": step, "loss_dict": dict(losses or {}), "tag": "step"},
    )


def cut(path: Path) -> None:
    """Removes the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


def steps(run: RunDirectory) -> list[int]:
    """Returns the steps of the checkpoints of a run."""
    return [
        int(path.name.removeprefix("step_"))
        for path in sorted((run.path / "checkpoints").glob("step_*"))
        if path.suffix != ".tmp"
    ]
