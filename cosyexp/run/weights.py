"""Selects the weights of a run, and loads weights into networks."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import BY_LOSS, META, Criterion, corruption
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import DamagedFileError, Fields, read_yaml
from cosyexp.run.headers import our_name, refuse_misfit, refuse_other_shapes, shapes_of
from cosyexp.run.pickles import load_pickle, state_dict_in
from cosyexp.run.tensors import read_tensors

log = logging.getLogger(__name__)


def find_weights(run: RunDirectory, choice: str, criterion: Criterion = BY_LOSS) -> Path:
    """Returns the weights file of a run that a choice refers to.

    Args:
        run: the run.
        choice: `best` by the criterion, `last`, `ema` (of the last checkpoint), `average` (the
            newest), the name of an average, or the path of a file. Damaged checkpoints are skipped,
            and the best is not the untrained one of step 0, unless there are no others.
        criterion: what is best.

    Raises:
        UserError: there are no such weights, or the average is damaged.
    """
    model = run.config().model.name
    if choice in ("best", "last", "ema"):
        candidates = run.checkpoints.all()[::-1]
        if choice == "best":
            ranked = criterion.rank(candidates)
            candidates = [c for c in ranked if c.step > 0] or ranked
        checkpoint = next((c for c in candidates if run.checkpoints.is_intact(c)), None)
        name = "ema" if choice == "ema" else model
        if checkpoint is None or f"{name}.safetensors" not in checkpoint.meta["sha256"]:
            raise UserError(
                f"{run} has no checkpoint for weights={choice}: train it further, or choose other "
                f"weights"
            )
        return checkpoint.path / f"{name}.safetensors"
    complete = (path for path in run.averages.glob("*/meta.yaml") if path.parent.suffix != ".tmp")
    averages = [
        path.parent.name for path in sorted(complete, key=lambda path: path.stat().st_mtime)
    ]
    if choice == "average":
        if not averages:
            raise UserError(
                f"{run} has no average yet: create one with python -m cosyexp.average run_dir={run}"
            )
        choice = averages[-1]
    if choice in averages:
        return _average_file(run.averages / choice, f"{model}.safetensors")
    if (path := Path(choice).expanduser()).is_file():
        return path
    names = ", ".join(["best", "last", "ema", "average", *averages])
    raise UserError(
        f"weights={choice} is neither a file nor the name of weights of {run}: give one of "
        f"{names}, or the path of a file"
    )


def _average_file(folder: Path, name: str) -> Path:
    """Returns the weights file of an average; raises a UserError if it is damaged."""
    try:
        reason = corruption(folder, Fields(read_yaml(folder / META), folder / META).hashes(), name)
    except (OSError, DamagedFileError) as error:
        detail = f" ({error.reason})" if isinstance(error, DamagedFileError) else ""
        reason = f"its {META} cannot be read{detail}"
    if reason:
        raise UserError(f"{folder} is damaged ({reason}): create it again with cosyexp.average")
    return folder / name


def read_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """Reads all tensors of a weights file and gives them the parameter names of this repository.

    Args:
        path: a `.safetensors` file of this repository, an official release, a training checkpoint
            of the original CosyVoice (whose `epoch` and `step` are ignored), or the output of
            DeepSpeed's `zero_to_fp32`.

    Returns:
        The tensors of each network: "model", and "discriminator" if the file has one.

    Raises:
        UserError: the file is missing, damaged, or not a mapping of names to tensors.
    """
    try:
        content: Any = read_tensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist: check the path") from None
    networks: dict[str, dict[str, Tensor]] = {"model": {}}
    for name, tensor in state_dict_in(content, path).items():
        network, parameter = our_name(name)
        networks.setdefault(network, {})[parameter] = tensor
    return networks


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads the model of a weights file into a network; all names and shapes must match.

    A UserError of `refuse_misfit`, `read_weights` or `load_tensors` tells why the file cannot be
    loaded.
    """
    refuse_misfit(network, path)
    load_tensors(network, read_weights(path)["model"], path)


def load_tensors(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Loads tensors into a network.

    Args:
        network: the network.
        tensors: the tensors by parameter name.
        path: the file that they come from, for error messages.
        strict: refuse tensors unless all names and shapes match; otherwise load those that do.

    Returns:
        The names in the network that were not loaded, and the names in the file that were not used.

    Raises:
        UserError: names or shapes differ and `strict` is set, nothing matches, or a value is not
            finite.
    """
    expected = network.state_dict()
    missing = [n for n in expected if n not in tensors]
    unknown = [n for n in tensors if n not in expected]
    common = [n for n in expected if n in tensors]
    mismatched = [n for n in common if expected[n].shape != tensors[n].shape]
    if strict or len(common) == len(mismatched):
        refuse_other_shapes(shapes_of(expected), shapes_of(tensors), path)
    nonfinite = next(
        (
            n
            for n in common
            if n not in mismatched
            and tensors[n].is_floating_point()
            and not tensors[n].isfinite().all()
        ),
        None,
    )
    if nonfinite:
        raise UserError(
            f"{path} holds values that are not finite (in {nonfinite}), as it is damaged or its "
            f"training diverged: choose other weights"
        )
    network.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in mismatched}, strict=strict
    )
    return missing + mismatched, unknown + mismatched


def weights_of(source: str) -> Path:
    """Returns the weights file that a run or a path refers to.

    Args:
        source: a weights file, or a run, which stands for its newest average or, if it has none,
            its last checkpoint.

    Raises:
        UserError: `source` does not exist, or is a run without weights.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there are no weights {source}: give a run or a weights file")
    run = RunDirectory(path)
    return find_weights(run, "average" if any(run.averages.glob("*/meta.yaml")) else "last")


def init_weights(
    networks: Mapping[str, nn.Module], model: str, source: str, strict: bool = True
) -> Path:
    """Initializes the networks of a training from a run or a weights file.

    Args:
        networks: the networks by name.
        model: name of the network that is exported. Any other network, such as a discriminator,
            keeps its random initialization if the source has no weights for it.
        source: a run (its newest average or, if it has none, its last checkpoint) or a weights
            file.
        strict: refuse weights whose names or shapes differ from the network's.

    Returns:
        The file that the weights of the model come from.
    """
    path = weights_of(source)
    folder = Path(source).expanduser()
    content = read_weights(path)
    _load_initial(networks[model], content["model"], path, strict)
    for name, network in networks.items():
        if name == model:
            continue
        run = RunDirectory(folder)
        checkpoint = find_weights(run, "last").parent if folder.is_dir() else None
        file = checkpoint / f"{name}.safetensors" if checkpoint else path
        tensors = read_weights(file)["model"] if checkpoint and file.exists() else content.get(name)
        if tensors:
            _load_initial(network, tensors, file, strict)
        else:
            log.info("%s has no %s, which starts from scratch", source, name)
    return path


def _load_initial(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, strict: bool
) -> None:
    """Loads tensors into a network and logs which were loaded, missing and unused."""
    try:
        missing, unused = load_tensors(network, tensors, path, strict)
    except UserError as error:
        hint = "; init_strict=false loads only tensors whose name and shape match" if strict else ""
        raise UserError(f"{error}{hint}") from None
    log.info(
        "%s: %d tensors loaded, %d newly initialized, %d not used",
        path,
        len(tensors) - len(unused),
        len(missing),
        len(unused),
    )
    for names, what in ((missing, "newly initialized"), (unused, "not used")):
        if names:
            log.info("%d %s: %s", len(names), what, ", ".join(names))
