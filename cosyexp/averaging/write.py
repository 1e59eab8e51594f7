"""Writes an average into its run or to a file, atomically."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cosyexp.averaging.candidates import CheckpointFolder
from cosyexp.averaging.methods import Method, WeightedSum
from cosyexp.averaging.select import Selection
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import META, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import finite, locked, replacement, sync, write_text


def folder_name(selection: Selection, method: Method) -> str:
    """Returns a name: best5, last3-window1000-2000, best5-mse-greedy, last5-acc-weighted0.1."""
    metric = selection.criterion.metric
    named = selection.rule == "best" or metric == "loss" or not method.uses_metric
    return "-".join(
        part for part in (selection.name, "" if named else metric, method.suffix) if part
    )


def output_file(output: str) -> Path:
    """Returns the path of `output=`.

    Raises:
        UserError: it does not end in .pt or .safetensors, or is a folder.
    """
    path = Path(output)
    if path.suffix not in (".pt", ".safetensors") or path.is_dir():
        raise UserError(f"output={output} must be a file that ends in .pt or .safetensors")
    return path


def write_file(average: WeightedSum, output: Path) -> Path:
    """Writes the weights alone, as `.pt` or `.safetensors`."""
    with replacement(output) as part:
        average.write(part, pickled=output.suffix == ".pt")
    return output


def write_folder(
    average: WeightedSum, source: CheckpointFolder, name: str, about: Mapping[str, Any]
) -> Path:
    """Writes `averages/<name>/` with a `meta.yaml`, and returns the file of weights.

    Two processes at once wait for one another. An interrupted one leaves a `.tmp` folder, which the
    next average of that name removes.

    Args:
        about: added to meta.yaml.
    """
    averages = RunDirectory(source.folder).averages
    folder, part, old = (averages / f"{name}{suffix}" for suffix in ("", ".tmp", ".old.tmp"))
    with locked(averages):
        if old.exists() and not folder.exists():  # killed between the two renames below
            os.replace(old, folder)
        try:
            for leftover in (part, old):
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir()
            average.write(part / source.file, pickled=source.file.endswith(".pt"))
            rows = [
                {
                    "file": candidate.path.relative_to(source.folder).as_posix(),
                    "step": candidate.step,
                    "epoch": candidate.epoch,
                    "weight": weight,
                    "loss_dict": finite(candidate.losses),
                }
                for candidate, weight in average.rows()
            ]
            hashes = {source.file: file_hash(part / source.file)}
            newest = max(candidate.step for candidate in source.found)
            meta = {**about, "run_step": newest, "sources": rows, "sha256": hashes}
            write_text(part / META, yaml.safe_dump(meta, sort_keys=False))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        sync(averages)
        shutil.rmtree(old, ignore_errors=True)
    return folder / source.file
