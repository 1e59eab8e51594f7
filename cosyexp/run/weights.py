"""Which weights of a run, and how they come into a network."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import read_tensors

log = logging.getLogger(__name__)


def find_weights(run: RunDirectory, choice: str) -> Path:
    """The file that `choice` means: best | last | ema | average (the newest) | a name under averages/ | a path.

    Raises UserError where there is none.
    """
    model = run.config()["model"]["name"]
    if choice in ("best", "last", "ema"):
        sound = run.checkpoints.is_sound
        found = run.checkpoints.all()[::-1]
        if choice == "best":
            found = sorted((c for c in found if math.isfinite(c.losses.get("loss", math.nan))), key=lambda c: c.losses["loss"])
        checkpoint = next((checkpoint for checkpoint in found if sound(checkpoint)), None)
        name = "ema" if choice == "ema" else model
        if checkpoint is None or not (checkpoint.path / f"{name}.safetensors").exists():
            raise UserError(f"{run} has no checkpoint for weights={choice}: train it further, or choose other weights")
        return checkpoint.path / f"{name}.safetensors"
    whole = (path for path in run.averages.glob("*/meta.yaml") if path.parent.suffix != ".tmp")
    averages = sorted(whole, key=lambda path: path.stat().st_mtime)
    if choice == "average":
        if not averages:
            raise UserError(f"{run} has no average yet: python -m cosyexp.average run_dir={run}")
        return averages[-1].parent / f"{model}.safetensors"
    for path in (run.averages / choice / f"{model}.safetensors", Path(choice)):
        if path.is_file():
            return path
    names = ", ".join(["best", "last", "ema", "average", *(path.parent.name for path in averages)])
    raise UserError(f"weights={choice} is neither a file nor one of {names} of {run}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` that holds a flat mapping of tensors."""
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there are no weights {path}") from None
    except Exception as error:
        raise UserError(f"{path} holds no readable weights: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads weights into a network, all of them; UserError where names or shapes differ."""
    tensors, wanted = read_weights(path), network.state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    other = sorted(n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape)
    faults = [
        f"{len(names)} {what} (such as {names[0]})"
        for names, what in ((missing, "are missing"), (unknown, "are unknown"), (other, "have another shape"))
        if names
    ]
    if faults:
        raise UserError(f"{path} does not fit the network: of its tensors {', '.join(faults)}")
    network.load_state_dict(tensors)


def init_weights(network: nn.Module, source: str) -> Path:
    """Starts a network from a run (its newest average, else its last checkpoint) or a file of weights; returns the file."""
    path = Path(source)
    if path.is_dir():
        run = RunDirectory(path)
        choice = "average" if any(run.averages.glob("*/meta.yaml")) else "last"
        path = find_weights(run, choice)
    load_weights(network, path)
    return path
