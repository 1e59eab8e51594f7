"""Loads models for synthesis: in PyTorch from their weights, or from exported files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from cosyexp.config import ExportedConfig, parse
from cosyexp.device import inference_device
from cosyexp.errors import UserError, reason
from cosyexp.exporting.components import component_class, load_components
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.origin import check_origin
from cosyexp.exporting.report import read_report
from cosyexp.exporting.source import ExportSource, source_from_run
from cosyexp.exporting.verify import eager, on_device
from cosyexp.registry import build
from cosyexp.run.checkpoint import BY_LOSS, Criterion
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import DamagedFileError, read_yaml

Outputs = tuple[Tensor, ...]
# The components that synthesis calls, by model.
COMPONENTS = {
    "llm": ("llm.prefill", "llm.decode"),
    "flow": ("flow.conditions", "flow.decoder.estimator"),
    "hifigan": ("hift",),
}
STREAMED = "flow.decoder.estimator.streaming"  # which a flow that can stream has


class Runner:
    """A component that is called with inputs by name, of which it takes those that it has.

    Args:
        inputs: names of its inputs, in order.
        function: runs it on the device.
        device: the inputs are moved there; the outputs stay there.
    """

    def __init__(
        self, inputs: Sequence[str], function: Callable[..., Outputs], device: torch.device
    ) -> None:
        self.inputs, self.function, self.device = inputs, function, device

    def __call__(self, **given: Tensor) -> Outputs:
        """Returns the outputs, in order."""
        return self.function(*(given[name].to(self.device) for name in self.inputs))


@dataclass(frozen=True)
class LoadedModel:
    """One of the three models, ready to run.

    Attributes:
        name: for messages.
        config: family, model and components.
        speakers: file of speaker embeddings by name; None if there is none.
        runners: its components by name.
        network: in PyTorch, for streams; None for exported files.
    """

    name: str
    config: ExportedConfig
    speakers: Path | None
    runners: Mapping[str, Runner]
    network: Any = None


def from_run(
    run: RunDirectory, weights: str, device: str, criterion: Criterion = BY_LOSS
) -> LoadedModel:
    """Loads the model of a run in PyTorch.

    Args:
        run: the run directory.
        weights: which weights of the run, see `find_weights`.
        device: where it runs, see `select_device`.
        criterion: validation metric that defines the best weights.
    """
    return from_source(source_from_run(run, weights, criterion), device)


def from_source(source: ExportSource, device: str) -> LoadedModel:
    """Loads a model in PyTorch.

    Args:
        source: of a run, or of a file of weights.
        device: where it runs, see `select_device`.
    """
    place = inference_device(device)
    components = load_components(source, needed(source.config, source.name))
    runners = {
        name: Runner(component.inputs, partial(eager, on_device(component, place)), place)
        for name, component in components.items()
    }
    network = getattr(components[next(iter(components))], "network", None)
    return LoadedModel(source.name, source.config, source.speakers, runners, network)


def from_run_exports(
    run: RunDirectory, backend: str, precision: str, device: str, trusted: bool = False
) -> LoadedModel:
    """Loads the files that were exported from a run.

    Args:
        run: the run directory.
        backend: name of the format.
        precision: of the files.
        device: where they run, see `select_device`.
        trusted: run them whoever wrote them, see `check_origin`.

    Raises:
        UserError: the model was not exported, or a file is missing, damaged or not trusted.
    """
    config, folder = run.config(), run.exports / backend
    hint = f"run_dir={run} format={backend} precision={precision}"
    form = read_format(folder / f"{config.model.name}.yaml", hint)
    speakers = run.speakers if run.speakers.exists() else None
    runners = load_runners(config, folder, form, precision, device, trusted, hint)
    return LoadedModel(str(run), config, speakers, runners)


def from_exports(
    folders: Iterable[Path], backend: str, precision: str, device: str, trusted: bool = False
) -> dict[str, LoadedModel]:
    """Loads the three models from the folders that they were exported to.

    Args:
        folders: of the exports.
        backend: name of the format.
        precision: of the files.
        device: where they run, see `select_device`.
        trusted: run them whoever wrote them, see `check_origin`.

    Returns:
        The models by name.

    Raises:
        UserError: a folder holds no export, one of the three models is missing, or a file is
            missing, damaged or not trusted.
    """
    found: dict[str, LoadedModel] = {}
    for folder in folders:
        excerpts = [path for model in COMPONENTS if (path := folder / f"{model}.yaml").is_file()]
        if not excerpts:
            raise UserError(
                f"{folder} holds no export: python -m cosyexp.export format={backend} out={folder}"
            )
        speakers = folder / "speakers.safetensors"
        for path in excerpts:
            hint = f"format={backend} precision={precision} out={folder}"
            config, form = read_excerpt(path), read_format(path, hint)
            runners = load_runners(config, folder, form, precision, device, trusted, hint)
            kept = speakers if speakers.exists() else None
            found[path.stem] = LoadedModel(str(folder), config, kept, runners)
    if missing := [model for model in COMPONENTS if model not in found]:
        raise UserError(
            f"exports= has no {' and no '.join(missing)}: give a folder per model, exports=a,b,c"
        )
    return found


def read_excerpt(path: Path) -> ExportedConfig:
    """Reads family, model and components of an export.

    Args:
        path: of `<model>.yaml`.

    Raises:
        UserError: the file was not written by an export, or is damaged.
    """
    values = _read_yaml(path)
    values.pop("format", None)
    try:
        return parse(ExportedConfig, values)
    except OmegaConfBaseException:
        raise UserError(f"{path} is not what an export wrote: export it again") from None


def read_format(path: Path, hint: str) -> ComponentFormat:
    """Builds the format that an export was written in.

    Args:
        path: of `<model>.yaml`.
        hint: overrides of the `export` command that writes it, for the message.

    Raises:
        UserError: there is no export, or its format cannot be loaded.
    """
    if not path.is_file():
        raise UserError(f"there is no export {path.parent}: python -m cosyexp.export {hint}")
    form: ComponentFormat = build(_read_yaml(path).get("format"), "format")
    if not isinstance(form, ComponentFormat):
        raise UserError(f"{path.parent} is an export that cannot be loaded: choose another format")
    return form


def load_runners(
    config: ExportedConfig,
    folder: Path,
    form: ComponentFormat,
    precision: str,
    device: str,
    trusted: bool,
    hint: str,
) -> dict[str, Runner]:
    """Loads the components of a model that synthesis needs.

    Args:
        config: of the model.
        folder: of its files.
        form: their format.
        precision: of the files.
        device: where they run, see `select_device`.
        trusted: run them whoever wrote them, see `check_origin`.
        hint: overrides of the `export` command that writes them, for the message.

    Raises:
        UserError: a file is missing, damaged or not trusted, or the format does not run on the
            device.
    """
    runners, place, report = {}, form.device(device), read_report(folder, precision)
    for name in needed(config, str(folder)):
        path = folder / form.file(name, precision)
        if not path.is_file():
            raise UserError(f"{folder} has no {path.name}: python -m cosyexp.export {hint}")
        check_origin(path, report.get(name, {}).get("sha256", {}), trusted)
        inputs = component_class(config.components[name]).inputs
        runners[name] = Runner(inputs, _load(form, path, precision, place), place)
    return runners


def needed(config: ExportedConfig, where: str) -> tuple[str, ...]:
    """Returns the names of the components that synthesis needs of a model.

    Args:
        config: of the model.
        where: run or folder of the model, for the message.

    Raises:
        UserError: the model does not have them.
    """
    names = COMPONENTS.get(config.model.name, ())
    if missing := [name for name in names if name not in config.components]:
        raise UserError(f"{where} has no component {missing[0]}, which synthesis needs")
    return names


def _load(
    form: ComponentFormat, path: Path, precision: str, device: torch.device
) -> Callable[..., Outputs]:
    try:
        return form.load(path, precision, device)
    except UserError:
        raise
    except Exception as error:  # each runtime raises its own
        raise UserError(f"{path} cannot be read ({reason(error)}): export it again") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except DamagedFileError as error:
        raise UserError(
            f"{path} is not what an export wrote ({error.reason}): export it again"
        ) from None
    if not isinstance(values, dict) or not values.get("components"):
        raise UserError(f"{path} is not what an export wrote: export it again")
    return values
