"""Selects the weights of a run, and loads weights into networks."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.run.adapters import adapter_note, find_base, merged
from cosyexp.run.checkpoint import BY_LOSS, META, Criterion, corruption
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import DamagedFileError, Fields, read_yaml
from cosyexp.run.headers import our_name, refuse_misfit, refuse_other_shapes, shapes_of
from cosyexp.run.pickles import load_pickle, state_dict_in
from cosyexp.run.tensors import read_tensors

log = logging.getLogger(__name__)

# Types that may be loaded into each other; all other types must be those of the network.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def find_weights(run: RunDirectory, choice: str, criterion: Criterion = BY_LOSS) -> Path:
    """Returns the weights file of a run that a choice refers to.

    Args:
        run: the run.
        choice: `best` by the criterion, `last`, `ema` (of the last checkpoint), `average` (the
            newest, with a warning if the run was trained on since), the name of an average, or the
            path of a file. Damaged checkpoints are skipped, and the best is not the untrained one
            of step 0, unless there are no others.
        criterion: what is best.

    Raises:
        UserError: there are no such weights, or the average is damaged.
    """
    model = run.config().weights_file
    if choice in ("best", "last", "ema"):
        candidates = run.checkpoints.all()[::-1]
        if choice == "best":
            ranked = criterion.rank(candidates)
            candidates = [c for c in ranked if c.step > 0] or ranked
        checkpoint = next((c for c in candidates if run.checkpoints.is_intact(c)), None)
        name = "ema.safetensors" if choice == "ema" else model
        if checkpoint is None or name not in checkpoint.meta["sha256"]:
            raise UserError(
                f"{run} has no checkpoint for weights={choice}: train it further, or choose other "
                f"weights"
            )
        return checkpoint.path / name
    averages = _averages(run)
    if choice == "average":
        if not averages:
            raise UserError(
                f"{run} has no average yet: create one with python -m cosyexp.average run_dir={run}"
            )
        choice = list(averages)[-1]
        if stale := _later_training(run, averages[choice]):
            log.warning("%s: weights=average takes %s, but %s", run, choice, stale)
    if choice in averages:
        return _average_file(run.averages / choice, model)
    if (path := Path(choice).expanduser()).is_file():
        return path
    names = ", ".join(["best", "last", "ema", "average", *averages])
    raise UserError(
        f"weights={choice} is neither a file nor the name of weights of {run}: give one of "
        f"{names}, or the path of a file"
    )


def criteria(runs: Mapping[str, RunDirectory], criterion: Criterion) -> dict[str, Criterion]:
    """Returns what is best in each of several runs; the lowest loss if the metric is not known.

    A metric such as the word error rate is measured in one of three runs, often.

    Args:
        runs: by name.
        criterion: what is best in those that were validated by it; in all, if none was.
    """
    if criterion == BY_LOSS:
        return dict.fromkeys(runs, criterion)
    measured = {name for name, run in runs.items() if criterion.rank(run.checkpoints.all())}
    for name in runs.keys() - measured if measured else ():
        log.info("%s was not validated by %s: its best is by loss", runs[name], criterion.metric)
    return {name: criterion if name in measured or not measured else BY_LOSS for name in runs}


def _averages(run: RunDirectory) -> dict[str, int]:
    """Returns the step that the run was at when each average was made, the newest average last."""
    steps = {}
    paths = [path for path in run.averages.glob(f"*/{META}") if path.parent.suffix != ".tmp"]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            steps[path.parent.name] = Fields(read_yaml(path), path).whole("run_step")
        except (OSError, DamagedFileError):
            steps[path.parent.name] = -1
    return dict(sorted(steps.items(), key=lambda average: average[1]))


def _later_training(run: RunDirectory, step: int) -> str:
    """Returns how far a run went after an average was made at a step; empty if not at all."""
    newest = max((checkpoint.step for checkpoint in run.checkpoints.all()), default=step)
    return f"the run went on from step {step} to {newest} after it" if newest > step else ""


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
            of the original CosyVoice (whose `epoch` and `step` are ignored), the output of
            DeepSpeed's `zero_to_fp32`, or an adapter, which is merged with its base.

    Returns:
        The tensors of each network: "model", and "discriminator" if the file has one.

    Raises:
        UserError: the file is missing, damaged, or not a mapping of names to tensors, or two of
            its names stand for one parameter and have different values.
    """
    try:
        if note := adapter_note(path):
            return {"model": merged(read_weights(find_base(path, note))["model"], path, note)}
        content: Any = read_tensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist: check the path") from None
    networks: dict[str, dict[str, Tensor]] = {"model": {}}
    names: dict[tuple[str, str], str] = {}
    for name, tensor in state_dict_in(content, path).items():
        network, parameter = our_name(name)
        tensors = networks.setdefault(network, {})
        first = names.setdefault((network, parameter), name)
        if first != name and not _same(tensors[parameter], tensor):
            raise UserError(
                f"{path} holds two different tensors for {parameter}, as {first} and as {name}: "
                f"remove one of them"
            )
        tensors[parameter] = tensor
    return networks


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.layout == other.layout and torch.equal(one, other)


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
        UserError: names or shapes differ and `strict` is set, nothing matches, a type cannot be
            loaded without loss, or a value is not finite.
    """
    expected = network.state_dict()
    for name in expected:
        if name in tensors:
            _refuse_other_type(name, tensors[name], expected[name].dtype, path)
    missing = [n for n in expected if n not in tensors]
    unknown = [n for n in tensors if n not in expected]
    common = [n for n in expected if n in tensors]
    mismatched = [n for n in common if expected[n].shape != tensors[n].shape]
    if strict or len(common) == len(mismatched):
        refuse_other_shapes(shapes_of(expected), shapes_of(tensors), path)
    for name in common:
        if name in mismatched:
            continue
        if not tensors[name].to(expected[name].dtype).isfinite().all():
            raise UserError(
                f"{path} holds values that are not finite as {_dtype(expected[name].dtype)} (in "
                f"{name}): it is damaged, or its training diverged; choose other weights"
            )
    network.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in mismatched}, strict=strict
    )
    return missing + mismatched, unknown + mismatched


def _refuse_other_type(name: str, tensor: Tensor, wanted: torch.dtype, path: Path) -> None:
    """Checks that a tensor can be loaded into a parameter or a buffer of a type.

    Raises:
        UserError: the tensor is sparse, nested, quantized or without values, or its type cannot be
            converted.
    """
    plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
    dtype = tensor.dtype
    if plain and (dtype == wanted or (dtype in FLOATS and wanted in FLOATS)):
        return
    kind = _dtype(dtype) if plain else f"a {_layout(tensor)} tensor of {_dtype(dtype)}"
    raise UserError(
        f"{path} holds {name} as {kind}, which cannot be loaded as {_dtype(wanted)}: convert the "
        f"file to {_dtype(wanted)}, or choose other weights"
    )


def _layout(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    return "meta" if tensor.device.type == "meta" else "sparse"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_of(source: str) -> Path:
    """Returns the weights file that a run or a path refers to.

    Args:
        source: a weights file, or a run. A run stands for its newest average, unless it has none or
            was trained on since, and then for its last checkpoint; the log says which and why.

    Raises:
        UserError: `source` does not exist, or is a run without weights.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there are no weights {source}: give a run or a weights file")
    run = RunDirectory(path)
    averages = _averages(run)
    if not averages:
        return find_weights(run, "last")
    name = list(averages)[-1]
    if stale := _later_training(run, averages[name]):
        log.info("%s: taking the last checkpoint, not the average %s, as %s", run, name, stale)
        return find_weights(run, "last")
    log.info("%s: taking its newest average, %s", run, name)
    return find_weights(run, name)


def init_weights(
    networks: Mapping[str, nn.Module],
    model: str,
    source: str,
    strict: bool = True,
    extended: Collection[str] = (),
) -> Path:
    """Initializes the networks of a training from a run or a weights file.

    Args:
        networks: the networks by name.
        model: name of the network that is exported. Any other network, such as a discriminator,
            keeps its random initialization if the source has no weights for it.
        source: a run or a weights file, see `weights_of`.
        strict: refuse weights whose names or shapes differ from the network's.
        extended: names of parameters of the model that may have fewer rows in the file; the others
            keep their random initialization.

    Returns:
        The file that the weights of the model come from.
    """
    path = weights_of(source)
    folder = Path(source).expanduser()
    content = read_weights(path)
    whole = _add_rows(content["model"], networks[model], extended)
    _load_initial(networks[model], whole, path, strict)
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


def _add_rows(
    tensors: Mapping[str, Tensor], network: nn.Module, names: Collection[str]
) -> dict[str, Tensor]:
    """Returns tensors with the missing last rows of some parameters, as they are in the network."""
    added = {
        name: torch.cat([tensors[name], own[len(tensors[name]) :].to(tensors[name].dtype)])
        for name, own in network.state_dict().items()
        if name in names
        and name in tensors
        and tensors[name].dtype in FLOATS
        and tensors[name].layout == torch.strided
        and tensors[name].shape[1:] == own.shape[1:]
        and len(tensors[name]) < len(own)
    }
    return {**tensors, **added}


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
