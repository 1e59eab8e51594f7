"""Checkpoints of a run: written atomically, and read only if their checksums match.

`Checkpoints.begin` opens a folder `step_N.tmp/`. `Checkpoints.commit` syncs every file and the
folder to disk, writes `meta.yaml` with the checksums last, renames the folder to `step_N/` and
syncs its parent. A process that is killed in between leaves only a `.tmp` folder, which the next
start of the run removes.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from cosyexp.run.documents import DamagedFileError, Fields, open_regular, read_yaml
from cosyexp.run.files import below, finite, sync, write_yaml
from cosyexp.run.folders import begin_folder, commit_folder, remove_partial_folders, remove_tree

log = logging.getLogger(__name__)
META = "meta.yaml"
THREADS = 1024  # maximum number of CPU threads
WEIGHTS = (".safetensors", ".pt")  # suffixes of files that must have a checksum


@dataclass(frozen=True)
class Checkpoint:
    """A folder of a checkpoint with the content of its `meta.yaml`.

    Args:
        path: the folder, `step_N`.
        meta: step, epoch, samples, loss_dict (validation losses), validation (the fingerprint of
            their data), tag, and sha256 of every file.
    """

    path: Path
    meta: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The number of updates that the model had when the checkpoint was saved."""
        step: int = self.meta["step"]
        return step

    @property
    def losses(self) -> Mapping[str, float]:
        """The finite validation losses at this step; empty if it was not validated then."""
        losses = self.meta.get("loss_dict") or {}
        return {name: value for name, value in losses.items() if value is not None}

    @property
    def validation(self) -> str | None:
        """The fingerprint of the validation data that the losses were measured on."""
        return self.meta.get("validation")

    def corruption(self, *names: str) -> str | None:
        """Describes the first file that is missing or does not match its checksum.

        Args:
            names: the files to check, all of them by default.

        Returns:
            The description, or None if all checked files are intact. Weights and states without a
            checksum are not.
        """
        return corruption(self.path, self.meta["sha256"], *names)


def corruption(folder: Path, hashes: Mapping[str, str], *names: str) -> str | None:
    """Describes the first file of a folder that is not as its `meta.yaml` says; None if all are.

    Args:
        folder: the folder.
        hashes: the SHA-256 of its files, by their paths below it.
        names: the files to check; by default all of them, and all weights must be among them.
    """
    for name in names or hashes:
        if name not in hashes:
            return f"{name} has no checksum in its {META}"
        try:
            if file_hash(folder / name) != hashes[name]:
                return f"{name} does not match its checksum"
        except (OSError, DamagedFileError):
            return f"{name} is missing"
    for path in () if names else folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix in WEIGHTS and name not in hashes:
            return f"{name} has no checksum in its {META}"
    return None


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Validated(Protocol):
    """Weights that were validated: a checkpoint of a run, or a candidate of an average."""

    @property
    def step(self) -> int:
        """The number of updates."""
        ...

    @property
    def losses(self) -> Mapping[str, float]:
        """The validation losses and metrics by name."""
        ...

    @property
    def validation(self) -> str | None:
        """The fingerprint of the validation data; None if it is not known."""
        ...


Scored = TypeVar("Scored", bound=Validated)


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the content of the `meta.yaml` of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it cannot be read, or lacks what every checkpoint has.
    """
    fields = Fields(read_yaml(folder / META), folder / META)
    known = {
        "step": fields.whole("step"),
        "epoch": fields.whole("epoch", 0),
        "samples": fields.whole("samples", 0),
        "loss_dict": fields.numbers("loss_dict"),
        "sha256": fields.hashes(),
    }
    if fields.content.get("threads") is not None:
        known["threads"] = fields.whole("threads", low=1, high=THREADS)
    return {**fields.content, **known}


@dataclass(frozen=True)
class Criterion:
    """A validation loss or metric that ranks checkpoints.

    Attributes:
        metric: its name.
        mode: "min" if the lowest value is best, "max" if the highest is.
    """

    metric: str = "loss"
    mode: str = "min"

    def cost(self, losses: Mapping[str, float]) -> float:
        """Returns a number of which the lowest is best; NaN if the metric was not measured."""
        value = losses.get(self.metric, math.nan)
        return -value if self.mode == "max" else value

    def rank(self, checkpoints: Sequence[Scored]) -> list[Scored]:
        """Returns those with a finite value on the newest validation data, the best first.

        Losses on other data cannot be compared with these.
        """
        scored = [c for c in checkpoints if math.isfinite(self.cost(c.losses))]
        newest = max(scored, key=lambda c: c.step).validation if scored else None
        return sorted(
            (c for c in scored if c.validation == newest), key=lambda c: self.cost(c.losses)
        )


BY_LOSS = Criterion()


class KeepBest(NamedTuple):
    """A rule of pruning: the `num` best checkpoints by a criterion stay."""

    criterion: Criterion
    num: int


class Checkpoints:
    """The checkpoints of a run, in `<run>/checkpoints/`."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self._intact: set[Path] = set()  # checkpoints whose checksums were already verified

    def all(self) -> list[Checkpoint]:
        """Returns all checkpoints, oldest first, without verifying their checksums.

        A checkpoint whose `meta.yaml` is missing or unreadable is skipped with a warning.
        """
        checkpoints = []
        for path in sorted(self.folder.glob("step_*")):
            if path.suffix == ".tmp":
                continue
            try:
                checkpoints.append(Checkpoint(path, read_meta(path)))
            except (OSError, DamagedFileError) as error:
                reason = error.reason if isinstance(error, DamagedFileError) else error.strerror
                message = "%s is skipped: its %s is missing or unreadable (%s)"
                log.warning(message, path, META, reason)
        return checkpoints

    def is_intact(self, checkpoint: Checkpoint) -> bool:
        """Returns whether all checksums of a checkpoint match, and logs a warning if one does not.

        The files of an intact checkpoint are read only once for this.
        """
        if checkpoint.path not in self._intact:
            if corruption := checkpoint.corruption():
                log.warning("%s is skipped: %s", checkpoint.path, corruption)
                return False
            self._intact.add(checkpoint.path)
        return True

    def latest(self) -> Checkpoint | None:
        """Returns the newest intact checkpoint, or None if there is none."""
        return next(
            (checkpoint for checkpoint in reversed(self.all()) if self.is_intact(checkpoint)), None
        )

    def begin(self, step: int) -> Path:
        """Creates an empty folder for the files of a checkpoint; `commit` completes it."""
        return begin_folder(below(self.run, "checkpoints", f"step_{step:08d}"))

    def commit(self, written: Path, meta: Mapping[str, Any]) -> Checkpoint:
        """Turns a folder with all its files into a checkpoint, atomically.

        Args:
            written: the folder that `begin` created.
            meta: the content of `meta.yaml`, without the checksums.
        """
        files = sorted(path for path in written.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(written)): file_hash(path) for path in files}
        for path in {*files, *(path.parent for path in files)}:
            sync(path)
        complete_meta = {**finite(meta), "sha256": hashes}
        write_yaml(written / META, complete_meta)
        path = commit_folder(written)
        self._intact.add(path)
        return Checkpoint(path, complete_meta)

    def prune(self, keep_last: int, keep_best: Sequence["KeepBest"]) -> None:
        """Removes all checkpoints except the newest and the best; never the two newest intact ones.

        Args:
            keep_last: number of newest checkpoints to keep.
            keep_best: rules, each of which keeps some of the best on each set of validation data.
        """
        checkpoints = self.all()
        keep = {checkpoint.path for checkpoint in checkpoints[-keep_last:] if keep_last}
        for validation in {checkpoint.validation for checkpoint in checkpoints}:
            comparable = [c for c in checkpoints if c.validation == validation]
            for rule in keep_best:
                keep |= {c.path for c in rule.criterion.rank(comparable)[: rule.num]}
        intact = 0
        for checkpoint in reversed(checkpoints):
            if intact < 2 and self.is_intact(checkpoint):
                intact += 1
            elif intact == 2 and checkpoint.path not in keep:
                remove_tree(checkpoint.path)
                if checkpoint.path.exists():
                    log.warning("%s could not be removed", checkpoint.path)

    def remove_partial(self) -> None:
        """Removes the folders of interrupted saves."""
        remove_partial_folders(self.folder, "step_*")
