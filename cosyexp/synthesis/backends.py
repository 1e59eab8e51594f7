"""What runs the components of a model: PyTorch from its weights, or the files that were exported from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import component_class, load_components
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.pt2 import Pt2
from cosyexp.exporting.source import source_from_run
from cosyexp.exporting.verify import eager
from cosyexp.run.directory import RunDirectory

Outputs = tuple[Tensor, ...]
FORMATS: Mapping[str, type[ComponentFormat]] = {"onnx": Onnx, "jit": Jit, "pt2": Pt2}
COMPONENTS = {  # what synthesis calls
    "llm": ("llm.prefill", "llm.decode"),
    "flow": ("flow.conditions", "flow.decoder.estimator"),
    "hifigan": ("hift",),
}


class Runner:
    """A component, called with inputs by name; it takes those that it has."""

    def __init__(self, inputs: Sequence[str], function: Callable[..., Outputs]) -> None:
        self.inputs, self.function = inputs, function

    def __call__(self, **given: Tensor) -> Outputs:
        return self.function(*(given[name] for name in self.inputs))


@dataclass(frozen=True)
class LoadedModel:
    """One of the three models, ready to run.

    name: for messages. config: family, model and components of its training. speakers: where embeddings are, if they are known.
    """

    name: str
    config: Mapping[str, Any]
    speakers: Path | None
    runners: Mapping[str, Runner]


def from_run(run: RunDirectory, weights: str) -> LoadedModel:
    """A run in PyTorch, with the weights that are chosen there."""
    source = source_from_run(run, weights)
    components = load_components(source, needed(source.config, str(run)))
    runners = {
        name: Runner(component.inputs, partial(eager, component))
        for name, component in components.items()
    }
    return LoadedModel(str(run), source.config, source.speakers, runners)


def from_run_exports(run: RunDirectory, backend: str, precision: str) -> LoadedModel:
    """A run by what was exported from it."""
    speakers = run.speakers if run.speakers.exists() else None
    hint = f"run_dir={run} format={backend} precision={precision}"
    return LoadedModel(
        str(run),
        run.config(),
        speakers,
        load_runners(run.config(), run.exports / backend, backend, precision, hint),
    )


def from_exports(folders: Iterable[Path], backend: str, precision: str) -> dict[str, LoadedModel]:
    """The models that were exported into folders, by their names: each folder has a `<model>.yaml` for each of its models."""
    found: dict[str, LoadedModel] = {}
    for folder in folders:
        excerpts = [path for model in COMPONENTS if (path := folder / f"{model}.yaml").is_file()]
        if not excerpts:
            raise UserError(
                f"{folder} holds nothing that was exported: python -m cosyexp.export format={backend} out={folder}"
            )
        speakers = folder / "speakers.safetensors"
        for path in excerpts:
            config = read_excerpt(path)
            runners = load_runners(
                config,
                folder,
                backend,
                precision,
                f"format={backend} precision={precision} out={folder}",
            )
            found[path.stem] = LoadedModel(
                str(folder), config, speakers if speakers.exists() else None, runners
            )
    if missing := [model for model in COMPONENTS if model not in found]:
        raise UserError(
            f"exports= holds no {' and no '.join(missing)}: name a folder for each model, as exports=a,b,c"
        )
    return found


def read_excerpt(path: Path) -> dict[str, Any]:
    """The family, model and components of what was exported."""
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or any(
        not isinstance(config.get(part), dict) for part in ("family", "model", "components")
    ):
        raise UserError(f"{path} is not what an export wrote: export it again")
    return config


def load_runners(
    config: Mapping[str, Any], folder: Path, backend: str, precision: str, hint: str
) -> dict[str, Runner]:
    """The components of a model, from their files. hint: the words by which `export` writes them."""
    form, runners = FORMATS[backend](), {}
    for name in needed(config, str(folder)):
        path = folder / form.file(name, precision)
        if not path.exists():
            raise UserError(f"{folder} has no {path.name}: python -m cosyexp.export {hint}")
        runners[name] = Runner(
            component_class(config["components"][name]).inputs, _load(form, path, precision)
        )
    return runners


def needed(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = COMPONENTS[config["model"]["name"]]
    if missing := [name for name in names if name not in (config.get("components") or {})]:
        raise UserError(
            f"{where} has no component {missing[0]}, which synthesis needs: give a run of another network"
        )
    return names


def _load(form: ComponentFormat, path: Path, precision: str) -> Callable[..., Outputs]:
    try:
        return form.load(path, precision)
    except Exception as error:  # each runtime has its own
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): export it again"
        ) from None
