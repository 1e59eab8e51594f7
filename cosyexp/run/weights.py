"""Which weights of a run, and how they come into a network."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import META, Checkpoint
from cosyexp.run.directory import RunDirectory
from cosyexp.run.pickles import load_pickle
from cosyexp.run.tensors import read_tensors

log = logging.getLogger(__name__)
LEGACY = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}  # torch's older weight norm
WRAPPINGS = ("module", "state_dict", "model")


def find_weights(run: RunDirectory, choice: str) -> Path:
    """The file that `choice` means: best | last | ema | average (the newest) | a name under averages/ | a path.

    Raises UserError where there is none.
    """
    model = run.config()["model"]["name"]
    if choice in ("best", "last", "ema"):
        sound = run.checkpoints.is_intact
        found = run.checkpoints.all()[::-1]
        if choice == "best":
            found = sorted(
                (c for c in found if math.isfinite(c.losses.get("loss", math.nan))),
                key=lambda c: c.losses["loss"],
            )
        checkpoint = next((checkpoint for checkpoint in found if sound(checkpoint)), None)
        name = "ema" if choice == "ema" else model
        if checkpoint is None or not (checkpoint.path / f"{name}.safetensors").exists():
            raise UserError(
                f"{run} has no checkpoint for weights={choice}: train it further, or choose other weights"
            )
        return checkpoint.path / f"{name}.safetensors"
    whole = (path for path in run.averages.glob("*/meta.yaml") if path.parent.suffix != ".tmp")
    averages = [path.parent.name for path in sorted(whole, key=lambda path: path.stat().st_mtime)]
    if choice == "average":
        if not averages:
            raise UserError(f"{run} has no average yet: python -m cosyexp.average run_dir={run}")
        choice = averages[-1]
    if choice in averages:
        return _average(run.averages / choice, f"{model}.safetensors")
    if Path(choice).is_file():
        return Path(choice)
    names = ", ".join(["best", "last", "ema", "average", *averages])
    raise UserError(f"weights={choice} is neither a file nor one of {names} of {run}")


def _average(folder: Path, name: str) -> Path:
    """The weights of an average; UserError where they are not what was written."""
    try:
        corruption = Checkpoint(folder, yaml.safe_load((folder / META).read_text())).corruption(
            name
        )
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        corruption = f"its {META} cannot be read"
    if corruption:
        raise UserError(f"{folder} is damaged: {corruption}; make it again with cosyexp.average")
    return folder / name


def read_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file under the names that they have here, by network: "model" and, where it has them, "discriminator".

    The file is one of ours (`.safetensors`), an official release, a training checkpoint of the original (whose `epoch` and `step`
    are left out), or one that DeepSpeed's zero_to_fp32 wrote.
    """
    try:
        content: Any = read_tensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    except FileNotFoundError:
        raise UserError(f"there are no weights {path}") from None
    for wrapping in WRAPPINGS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a mapping of names to tensors"
        )
    networks: dict[str, dict[str, Tensor]] = {"model": {}}
    for name, tensor in content.items():
        if isinstance(tensor, Tensor):
            network, ours = our_name(name)
            networks.setdefault(network, {})[ours] = tensor
    return networks


def our_name(name: str) -> tuple[str, str]:
    """The network that a tensor of the original belongs to, and its name in it: with weight norms as parametrizations."""
    name = name.removeprefix("module.")  # of torch's wrapper for several processes
    network = "discriminator" if name.startswith("discriminator.") else "model"
    name = name.removeprefix("generator.").removeprefix("discriminator.")
    for legacy, modern in LEGACY.items():
        if name.endswith(f".{legacy}"):
            name = f"{name.removesuffix(legacy)}{modern}"
    return network, name


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads the model in a file into a network, all of it; UserError where names or shapes differ."""
    load_tensors(network, read_weights(path)["model"], path)


def load_tensors(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Loads tensors into a network; UserError where names or shapes differ, if `strict`, and where nothing fits.

    Returns the names that the network has anew, and those that it leaves out.
    """
    wanted = network.state_dict()
    missing, unknown = (
        [n for n in wanted if n not in tensors],
        [n for n in tensors if n not in wanted],
    )
    common = [n for n in wanted if n in tensors]
    other = [n for n in common if wanted[n].shape != tensors[n].shape]
    shapes = [
        f"{n}, {list(tensors[n].shape)} instead of {list(wanted[n].shape)}" for n in other[:1]
    ]
    kinds = (
        ("missing", missing, missing),
        ("unknown", unknown, unknown),
        ("of another shape", other, shapes),
    )
    faults = [
        f"{len(names)} {what} (such as {example[0]})" for what, names, example in kinds if names
    ]
    if len(common) == len(other) or (faults and strict):
        raise UserError(f"the tensors of {path} do not fit the network: {', '.join(faults)}")
    spoilt = next(
        (n for n in common if tensors[n].is_floating_point() and not tensors[n].isfinite().all()),
        None,
    )
    if spoilt:
        raise UserError(
            f"{path} holds values that are not finite (in {spoilt}): it was damaged or its training diverged, take another"
        )
    network.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in other}, strict=strict
    )
    return missing + other, unknown + other


def weights_of(source: str) -> Path:
    """The file of weights that a run (its newest average, else its last checkpoint) or a path means."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there are no weights {source}: name a run, or a file of weights")
    run = RunDirectory(path)
    return find_weights(run, "average" if any(run.averages.glob("*/meta.yaml")) else "last")


def init_weights(
    networks: Mapping[str, nn.Module], model: str, source: str, strict: bool = True
) -> Path:
    """Starts the networks of a training from a run (its newest average, else its last checkpoint) or a file of weights.

    model: which of the networks is the one that is exported; another one, a discriminator, starts from scratch where the source
    has none. Returns the file of the model.
    """
    path = weights_of(source)
    folder = Path(source).expanduser()
    beside = find_weights(RunDirectory(folder), "last").parent if folder.is_dir() else None
    found = read_weights(path)
    _start(networks[model], found["model"], path, strict)
    for name, network in networks.items():
        if name == model:
            continue
        own = beside / f"{name}.safetensors" if beside else path
        tensors = read_weights(own)["model"] if beside and own.exists() else found.get(name)
        if tensors:
            _start(network, tensors, own, strict)
        else:
            log.info("%s: it has no %s, which starts from scratch", source, name)
    return path


def _start(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, strict: bool) -> None:
    """Loads what a training starts from, and says what came and what did not."""
    try:
        missing, unknown = load_tensors(network, tensors, path, strict)
    except UserError as error:
        raise UserError(
            f"{error}; init_strict=false takes what has a name and a shape of the network's"
            if strict
            else str(error)
        ) from None
    log.info(
        "%s: %d tensors loaded, %d new, %d left out",
        path,
        len(tensors) - len(unknown),
        len(missing),
        len(unknown),
    )
    for names, what in ((missing, "new, not from the file"), (unknown, "left out of the file")):
        if names:
            log.info("%d %s: %s", len(names), what, ", ".join(names))
