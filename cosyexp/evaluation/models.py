"""Loads the models to evaluate: of runs, of exports, or of files of the official release."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cosyexp.cli.compose import compose_train
from cosyexp.config import EvaluateConfig
from cosyexp.exporting.source import ExportSource, source_from_file, source_from_run
from cosyexp.run.checkpoint import Criterion, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.weights import criteria
from cosyexp.synthesis.backends import LoadedModel, from_exports, from_run_exports, from_source


class Loaded(NamedTuple):
    """What is evaluated.

    Attributes:
        models: by name; one, two or all three.
        valid: the validation data of the first run, a list or several; None if there is none.
        about: where each model is from, for the report.
    """

    models: Mapping[str, LoadedModel]
    valid: Any
    about: dict[str, dict[str, str]]


def load_models(config: EvaluateConfig) -> Loaded:
    """Loads what a config names.

    Raises:
        UserError: a model is missing, damaged or not trusted.
    """
    options = config.backend, config.precision.value, config.device, config.trusted_exports
    if config.exports:
        models = from_exports(map(Path, config.exports), *options)
        return Loaded(models, None, {name: {"from": model.name} for name, model in models.items()})
    if config.official:
        sources = {
            name: source_from_file(
                compose_train([f"family={config.official}", f"model={name}"]), path
            )
            for name, path in config.given.items()
        }
        return Loaded(_load(sources, config.device), None, _about(sources))
    runs = {name: RunDirectory(path) for name, path in config.given.items()}
    valid = next(iter(runs.values())).config().data.valid
    if config.backend != "torch":
        models = {name: from_run_exports(run, *options) for name, run in runs.items()}
        return Loaded(models, valid, {name: {"from": str(run)} for name, run in runs.items()})
    best = criteria(runs, Criterion(config.metric, config.metric_mode.value))
    sources = {name: source_from_run(run, config.weights, best[name]) for name, run in runs.items()}
    return Loaded(_load(sources, config.device), valid, _about(sources))


def _load(sources: Mapping[str, ExportSource], device: str) -> dict[str, LoadedModel]:
    return {name: from_source(source, device) for name, source in sources.items()}


def _about(sources: Mapping[str, ExportSource]) -> dict[str, dict[str, str]]:
    return {
        name: {
            "from": source.name,
            "weights": str(source.weights),
            "sha256": file_hash(source.weights),
        }
        for name, source in sources.items()
    }
