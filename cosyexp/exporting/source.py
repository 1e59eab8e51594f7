"""Finds the model to export: the config of a network, and a file of weights."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.run import networks
from cosyexp.run.checkpoint import BY_LOSS, META, Criterion, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import Fields, read_yaml
from cosyexp.run.weights import find_weights

VERIFIED = ("best", "last", "ema")  # choices whose hashes `find_weights` checks


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        name: for messages.
        config: of its training, or the one that a training would have.
        weights: file of weights.
        speakers: file of speaker embeddings by name; None if there is none.
    """

    name: str
    config: TrainConfig
    weights: Path
    speakers: Path | None = None


def source_from_run(run: RunDirectory, choice: str, criterion: Criterion = BY_LOSS) -> ExportSource:
    """Returns the model of a run.

    Args:
        run: the run directory.
        choice: of its weights, see `find_weights`.
        criterion: validation metric that defines the best weights.

    Raises:
        UserError: there are no such weights, or they are damaged.
    """
    config, weights = run.config(), find_weights(run, choice, criterion)
    expected = None if choice in VERIFIED else _stored_hash(weights)
    if expected and file_hash(weights) != expected:
        raise UserError(
            f"{weights} does not match its checksum: choose other weights, or create it again"
        )
    speakers = run.speakers if run.speakers.exists() else None
    return ExportSource(str(run), config, weights, speakers)


def source_from_file(config: TrainConfig, weights: str) -> ExportSource:
    """Returns the model of a file of weights that belongs to no run.

    Args:
        config: that a training of the model would have.
        weights: path of the file.

    Raises:
        UserError: there is no such file.
    """
    if not Path(weights).is_file():
        raise UserError(
            f"weights={weights} is not a file: with official=, give one such as flow.pt"
        )
    return ExportSource(weights, config, Path(weights))


def load_network(source: ExportSource) -> nn.Module:
    """Builds the network and loads its weights.

    Raises:
        UserError: the weights do not fit, or have values that are not finite.
    """
    return networks.load_network(source.config.network, source.weights)


def _stored_hash(weights: Path) -> str | None:
    """Returns the hash in the `meta.yaml` next to a file; None if there is no such file.

    Raises:
        UserError: the `meta.yaml` is damaged, or has no hash of the file.
    """
    path = weights.parent / META
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        return None
    if not isinstance(content, dict) or "sha256" not in content:  # of something else
        return None
    hashes = Fields(content, path).hashes()
    if weights.name not in hashes:
        raise UserError(f"{weights} has no checksum in its {META}: choose other weights")
    return hashes[weights.name]
