"""Writes an average into its run or to a file, atomically."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosyexp.averaging.candidates import CheckpointFolder
from cosyexp.averaging.methods import Method, WeightedSum
from cosyexp.averaging.select import Selection
from cosyexp.config.names import plain_name
from cosyexp.errors import UserError
from cosyexp.run.adapters import ADAPTER_CONFIG
from cosyexp.run.checkpoint import META, file_hash
from cosyexp.run.files import below, copy_file, finite, make_folder, replacement, write_yaml
from cosyexp.run.folders import begin_folder, commit_folder, locked, remove_tree


def folder_name(selection: Selection, method: Method) -> str:
    """Returns a name: best5, last3-window1000-2000, best5-mse-greedy, last5-acc-weighted0.1.

    Raises:
        UserError: the metric cannot be a part of it.
    """
    metric = selection.criterion.metric
    named = selection.rule == "best" or metric == "loss" or not method.uses_metric
    parts = (selection.name, "" if named else metric, method.suffix)
    return plain_name("-".join(part for part in parts if part), "metric")


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
    run = source.folder
    make_folder(below(run, "averages"))
    with locked(below(run, "averages", ".lock")):
        part = begin_folder(below(run, "averages", name))
        try:
            average.write(part / source.file, pickled=source.file.endswith(".pt"))
            config = average.newest.path.with_name(ADAPTER_CONFIG)
            if config.is_file():
                copy_file(config, part / ADAPTER_CONFIG)
            rows = [
                {
                    "file": candidate.path.relative_to(run).as_posix(),
                    "step": candidate.step,
                    "epoch": candidate.epoch,
                    "weight": weight,
                    "loss_dict": finite(candidate.losses),
                }
                for candidate, weight in average.rows()
            ]
            hashes = {path.name: file_hash(path) for path in sorted(part.iterdir())}
            newest = max(candidate.step for candidate in source.found)
            meta = {**about, "run_step": newest, "sources": rows, "sha256": hashes}
            write_yaml(part / META, meta)
        except BaseException:
            remove_tree(part)
            raise
        return commit_folder(part) / source.file
