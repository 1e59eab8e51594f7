"""Run directories that nothing was trained in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyexp.run.checkpoint import Checkpoint
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import save_tensors


def make_run(path: Path, config: Mapping[str, Any] | None = None) -> RunDirectory:
    run = RunDirectory(path)
    run.write_config({"family": {}, "model": {"name": "llm"}, "network": {}, **(config or {})}, [])
    return run


def add(
    run: RunDirectory,
    step: int,
    losses: Mapping[str, float] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    **others: Mapping[str, Tensor],
) -> Checkpoint:
    """A checkpoint with the model's weights, and with the other files of weights, by name."""
    folder, model = run.checkpoints.begin(step), run.config()["model"]["name"]
    for name, content in {
        model: tensors or {"weight": torch.full((4,), float(step))},
        **others,
    }.items():
        save_tensors(folder / f"{name}.safetensors", content)
    return run.checkpoints.commit(
        folder,
        {"step": step, "epoch": 0, "samples": step, "loss_dict": dict(losses or {}), "tag": "step"},
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def steps(run: RunDirectory) -> list[int]:
    return [
        int(path.name.removeprefix("step_"))
        for path in sorted((run.path / "checkpoints").glob("step_*"))
        if path.suffix != ".tmp"
    ]
