"""Checkpoints that are there whole or not at all, and are read only where their hashes hold.

A checkpoint is written into `step_N.tmp/`; every file and the folder are synced, `meta.yaml` with the hashes comes last, then the
folder is renamed and its parent synced. Whatever a kill leaves behind is a `.tmp` folder, which the next start removes.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cosyexp.run.files import sync, write_text

log = logging.getLogger(__name__)
META = "meta.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A folder `step_N` with its `meta.yaml`: step, epoch, samples, loss_dict, tag, sha256 of every file."""

    path: Path
    meta: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def losses(self) -> Mapping[str, float]:
        """What the validation at this step measured; empty where there was none."""
        return self.meta.get("loss_dict") or {}

    def corruption(self, *names: str) -> str | None:
        """What is wrong with some files, or with any of them; None where their hashes hold."""
        for name in names or self.meta["sha256"]:
            try:
                if file_hash(self.path / name) != self.meta["sha256"][name]:
                    return f"{name} is not what was written"
            except OSError:
                return f"{name} is missing"
        return None


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The checkpoints of a run, in `<run>/checkpoints/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._intact: set[Path] = set()  # those whose hashes were seen to hold

    def all(self) -> list[Checkpoint]:
        """Those with a readable `meta.yaml`, oldest first; their files are not checked."""
        found = []
        for path in sorted(self.folder.glob("step_*")):
            if path.suffix == ".tmp":
                continue
            try:
                meta = yaml.safe_load((path / META).read_text())
                found.append(
                    Checkpoint(
                        path, {**meta, "step": int(meta["step"]), "sha256": dict(meta["sha256"])}
                    )
                )
            except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
                log.warning("%s is passed over: its %s is missing or unreadable", path, META)
        return found

    def is_intact(self, checkpoint: Checkpoint) -> bool:
        """Whether its hashes hold; says so where they do not. A checkpoint is read once for that."""
        if checkpoint.path not in self._intact:
            if corruption := checkpoint.corruption():
                log.warning("%s is passed over: %s", checkpoint.path, corruption)
                return False
            self._intact.add(checkpoint.path)
        return True

    def latest(self) -> Checkpoint | None:
        """The newest one that is sound."""
        return next(
            (checkpoint for checkpoint in reversed(self.all()) if self.is_intact(checkpoint)), None
        )

    def begin(self, step: int) -> Path:
        """An empty folder to write the files of a checkpoint into."""
        path = self.folder / f"step_{step:08d}.tmp"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def commit(self, written: Path, meta: Mapping[str, Any]) -> Checkpoint:
        """Makes what was written into the folder of `begin` a checkpoint."""
        files = sorted(path for path in written.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(written)): file_hash(path) for path in files}
        for place in {*files, *(path.parent for path in files)}:
            sync(place)
        whole = {**meta, "sha256": hashes}
        write_text(written / META, yaml.safe_dump(whole, sort_keys=False))
        path, old = written.with_suffix(""), written.with_suffix(".old.tmp")
        if path.exists():  # of the same step: unsound, or saved by a stop before its validation
            os.replace(path, old)
        os.replace(written, path)
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self._intact.add(path)
        return Checkpoint(path, whole)

    def prune(self, keep_last: int, keep_best: int, metric: str = "loss") -> None:
        """Removes what is neither among the last nor among the best. The two newest sound ones stay in any case."""
        found = self.all()
        scored = [
            checkpoint
            for checkpoint in found
            if math.isfinite(checkpoint.losses.get(metric, math.nan))
        ]
        best = sorted(scored, key=lambda checkpoint: checkpoint.losses[metric])[:keep_best]
        keep = {checkpoint.path for checkpoint in [*best, *found[max(len(found) - keep_last, 0) :]]}
        sound = 0
        for checkpoint in reversed(found):
            if sound < 2 and self.is_intact(checkpoint):
                sound += 1
            elif sound == 2 and checkpoint.path not in keep:
                shutil.rmtree(checkpoint.path)

    def remove_partial(self) -> None:
        """Removes what an interrupted save left behind."""
        for path in self.folder.glob("step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
