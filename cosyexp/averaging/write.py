"""Writes an average into its run directory."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from cosyexp.averaging.mean import average
from cosyexp.run.checkpoint import META, Checkpoint, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import sync, write_text


def write_average(run: RunDirectory, name: str, model: str, checkpoints: Sequence[Checkpoint], output: str | None) -> Path:
    """Writes `averages/<name>/` with `meta.yaml`, whole or not at all, or the file `output`; returns the file of weights."""
    files = [checkpoint.path / f"{model}.safetensors" for checkpoint in checkpoints]
    if output is not None:
        part = Path(f"{output}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            average(files, part)
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)
        return Path(output)
    folder, part = run.averages / name, run.averages / f"{name}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    average(files, part / f"{model}.safetensors")
    share = 1 / len(files)
    meta = {
        "method": "uniform",
        "sources": [{"step": c.step, "weight": share, "loss_dict": dict(c.losses)} for c in checkpoints],
        "sha256": {f"{model}.safetensors": file_hash(part / f"{model}.safetensors")},
    }
    write_text(part / META, yaml.safe_dump(meta, sort_keys=False))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    sync(run.averages)
    return folder / f"{model}.safetensors"
