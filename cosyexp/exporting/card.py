"""The model card of an export, `MODEL.md`: what was trained on which data, and how good it is."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cosyexp.config import MODELS
from cosyexp.errors import UserError
from cosyexp.exporting.source import ExportSource
from cosyexp.run.checkpoint import META, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import DamagedFileError, Fields, read_json, read_text, read_yaml
from cosyexp.run.files import below, write_text

CARD = "MODEL.md"
SYSTEMS = {  # of an evaluation: the models that take part in each
    "llm": ("llm",),
    "vocoder": ("hifigan",),
    "copy_synthesis": ("flow", "hifigan"),
    "synthesis": MODELS,
}


def write_card(source: ExportSource, out: Path, license_name: str | None, evaluation: Path) -> None:
    """Writes the card of a model, next to those of other models in the same folder.

    Args:
        source: the model that was exported.
        out: folder of the export.
        license_name: of the weights, such as apache-2.0; None: not stated.
        evaluation: folder of an evaluation; its table is a part of the card if these weights were
            evaluated.
    """
    path, model = below(out, CARD), source.config.model.name
    try:
        known = re.split(r"^# ", read_text(path), flags=re.MULTILINE)[1:]
    except (FileNotFoundError, DamagedFileError):
        known = []
    cards = {card.partition("\n")[0]: f"# {card.rstrip()}\n" for card in known}
    license_name = license_name or "unknown"
    rows = {"license": license_name, **dict(about(source))}
    lines = [f"# {model}", "", *table([("", ""), *rows.items()])]
    if losses := validation(source):
        lines += ["", "## Validation", "", *table([("loss or metric", "value"), *losses.items()])]
    if evaluated := read_evaluation(evaluation / "evaluation.json", source):
        lines += ["", "## Evaluation", "", "Means, with 95 % intervals.", "", *table(evaluated)]
    cards[model] = "\n".join(lines) + "\n"
    header = ["---", f"license: {cell(license_name)}", "library_name: cosyexp"]
    header += ["pipeline_tag: text-to-speech", "---", ""]
    write_text(path, "\n".join([*header, *(cards[name] for name in sorted(cards))]))


def about(source: ExportSource) -> Iterator[tuple[str, Any]]:
    """Yields names and values of what is known of a model: its data, and its training."""
    config, meta = source.config, _meta(source.weights)
    yield "family", config.family.name
    yield "network", config.network.get("_target_")
    yield "weights", source.weights
    yield "sha256", file_hash(source.weights)
    if not RunDirectory(source.name).exists:
        return
    yield "training data", config.data.train
    yield "validation data", meta.get("validation") or config.data.valid
    yield "objective", config.objective.get("_target_")
    yield "initial weights", config.init_from or config.network.get("pretrained") or "random"
    for key in ("step", "epoch", "samples"):
        if key in meta:
            yield {"samples": "utterances seen"}.get(key, key), meta[key]
    if isinstance(meta.get("sources"), list):
        steps = [
            Fields(entry, source.weights.parent / META).whole("step") for entry in meta["sources"]
        ]
        yield "average of steps", ", ".join(map(str, steps))
    yield "learning rate", config.optimizer.get("lr")
    yield "precision", config.trainer.precision.value
    yield "seed", config.seed


def validation(source: ExportSource) -> dict[str, float]:
    """Returns the losses and metrics that the weights were validated with; empty if none."""
    return Fields(_meta(source.weights), source.weights.parent / META).numbers("loss_dict")


def read_evaluation(path: Path, source: ExportSource) -> list[tuple[Any, ...]]:
    """Returns the table of an evaluation of these weights, or nothing.

    Args:
        path: of evaluation.json.
        source: the model.
    """
    model = source.config.model.name
    try:
        fields = Fields(read_json(path), path)
        models = fields.inner("models")
        if models.inner(model).text("sha256", "") != file_hash(source.weights):
            return []
        systems = fields.inner("systems")
        found = {
            name: systems.inner(name)
            for name, models in SYSTEMS.items()
            if model in models and name in systems.content
        }
        metrics = dict.fromkeys(metric for system in found.values() for metric in system.content)
        return [
            ("metric", *found),
            *(
                (metric, *(_interval(system, metric) for system in found.values()))
                for metric in metrics
            ),
        ]
    except (OSError, UserError):  # there is none, or it is of something else
        return []


def table(rows: list[tuple[Any, ...]]) -> list[str]:
    """Returns the lines of a table in Markdown; the first row has the names of the columns."""
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def cell(value: Any) -> str:
    """Returns a value as the text of a cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _interval(system: Fields, metric: str) -> str:
    if metric not in system.content:
        return ""
    mean, low, high = (system.inner(metric).number(key) for key in ("mean", "low", "high"))
    return f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _meta(weights: Path) -> Mapping[str, Any]:
    """Returns the `meta.yaml` next to a file of weights; empty if there is none."""
    try:
        content = read_yaml(weights.parent / META)
    except (OSError, DamagedFileError):
        return {}
    return content if isinstance(content, dict) else {}
