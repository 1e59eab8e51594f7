"""Writes an average where it belongs, whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from cosyexp.averaging.candidates import CheckpointFolder
from cosyexp.averaging.methods import WeightedSum
from cosyexp.averaging.select import Choice
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import META, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import locked, replacement, sync, write_text


def folder_name(choice: Choice, method: str, temperature: float) -> str:
    """best5, last3-window1000-2000, best5-mse-greedy, last5-weighted0.1."""
    by = (
        choice.metric
        if choice.how != "best" and choice.metric != "loss" and method in ("weighted", "greedy")
        else ""
    )
    how = {"uniform": "", "weighted": f"weighted{temperature:g}"}.get(method, method)
    return "-".join(part for part in (choice.name, by, how) if part)


def output_file(output: str) -> Path:
    """UserError where no file of weights can be called so."""
    path = Path(output)
    if path.suffix not in (".pt", ".safetensors") or path.is_dir():
        raise UserError(
            f"output={output} is no name for a file of weights: end it in .pt or .safetensors"
        )
    return path


def write_file(average: WeightedSum, output: Path) -> Path:
    """Writes the weights alone, as `.pt` or `.safetensors`."""
    with replacement(output) as part:
        average.write(part, pickled=output.suffix == ".pt")
    return output


def write_folder(
    average: WeightedSum, candidates: CheckpointFolder, name: str, about: dict[str, Any]
) -> Path:
    """Writes `averages/<name>/` with `meta.yaml` into the folder of the candidates; returns the file of weights.

    Two at once wait for one another. Whatever a kill leaves behind is a `.tmp` folder, which the next average of that name removes.
    """
    averages = RunDirectory(candidates.folder).averages
    folder, part, old = (averages / f"{name}{suffix}" for suffix in ("", ".tmp", ".old.tmp"))
    with locked(averages):
        if old.exists() and not folder.exists():  # a kill came between the two renames below
            os.replace(old, folder)
        try:
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
            average.write(part / candidates.file, pickled=candidates.file.endswith(".pt"))
            sources = [
                {
                    "file": source.path.relative_to(candidates.folder).as_posix(),
                    "step": source.step,
                    "epoch": source.epoch,
                    "weight": weight,
                    "loss_dict": dict(source.losses),
                }
                for source, weight in average.rows()
            ]
            meta = {
                **about,
                "sources": sources,
                "sha256": {candidates.file: file_hash(part / candidates.file)},
            }
            write_text(part / META, yaml.safe_dump(meta, sort_keys=False))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        sync(averages)
        shutil.rmtree(old, ignore_errors=True)
    return folder / candidates.file
