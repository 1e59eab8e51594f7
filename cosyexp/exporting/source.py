"""What is exported: the network of a config, with the weights in a file."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.registry import build
from cosyexp.run.checkpoint import BY_LOSS, META, Criterion, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.weights import find_weights, load_weights

VERIFIED = ("best", "last", "ema")  # choices whose hashes `find_weights` checks


@dataclass(frozen=True)
class ExportSource:
    """A network and its weights.

    name: for messages. config: of its training, or one that a training would have. speakers: file
    of speaker embeddings by name, if there is one.
    """

    name: str
    config: TrainConfig
    weights: Path
    speakers: Path | None = None


def source_from_run(run: RunDirectory, choice: str, criterion: Criterion = BY_LOSS) -> ExportSource:
    """Returns a run with the weights that `choice` names, see `find_weights`.

    Raises:
        UserError: there are no such weights, or they are damaged.
    """
    config, weights = run.config(), find_weights(run, choice, criterion)
    expected = None if choice in VERIFIED else _stored_hash(weights)
    if expected and file_hash(weights) != expected:
        raise UserError(f"{weights} is not what was written: choose other weights, or rebuild it")
    speakers = run.speakers if run.speakers.exists() else None
    return ExportSource(str(run), config, weights, speakers)


def source_from_file(config: TrainConfig, weights: str) -> ExportSource:
    """Returns a file of weights without a run, and the config that a training would have.

    Raises:
        UserError: there is no such file.
    """
    if not Path(weights).is_file():
        raise UserError(f"weights={weights} is not a file: with official= it is one, as flow.pt")
    return ExportSource(weights, config, Path(weights))


def load_network(source: ExportSource) -> nn.Module:
    """Builds the network and loads its weights.

    Raises:
        UserError: they do not fit, or hold values that are not finite.
    """
    network: nn.Module = build(source.config.network, "network")
    load_weights(network, source.weights)
    return network


def _stored_hash(weights: Path) -> str | None:
    """Returns the hash in the `meta.yaml` next to a file, if there is one."""
    try:
        meta = yaml.safe_load((weights.parent / META).read_text())
        return str(meta["sha256"][weights.name])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
