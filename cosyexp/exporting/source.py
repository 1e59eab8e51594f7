"""What is exported: the network of a config, with the weights in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import META, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.targets import build
from cosyexp.run.weights import find_weights, load_weights

HASHED = ("best", "last", "ema")  # choices whose hashes are looked at on the way


@dataclass(frozen=True)
class ExportSource:
    """name: for messages. config: of the training, or one as a training would have it. speakers: embeddings by name, where known."""

    name: str
    config: Mapping[str, Any]
    weights: Path
    speakers: Path | None = None


def source_from_run(run: RunDirectory, choice: str) -> ExportSource:
    """A run with the weights that `choice` means there, see `find_weights`."""
    config, weights = run.config(), find_weights(run, choice)
    if (
        choice not in HASHED
        and (expected := noted_hash(weights))
        and file_hash(weights) != expected
    ):
        raise UserError(
            f"{weights} is not what was written: choose other weights, or make it again"
        )
    return ExportSource(str(run), config, weights, run.speakers if run.speakers.exists() else None)


def noted_hash(weights: Path) -> str | None:
    """What the `meta.yaml` beside a file says of it, if there is one."""
    try:
        return str(yaml.safe_load((weights.parent / META).read_text())["sha256"][weights.name])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None


def load_network(source: ExportSource) -> nn.Module:
    """The network with its weights; UserError where they do not fit, or hold what is no number."""
    network: nn.Module = build(source.config["network"])
    load_weights(network, source.weights)
    return network


def source_from_file(config: Mapping[str, Any], weights: str) -> ExportSource:
    """A file of weights without a run, and the config of a training of its network."""
    if not Path(weights).is_file():
        raise UserError(f"weights={weights} is no file: with family= it is one, such as flow.pt")
    return ExportSource(weights, config, Path(weights))
