"""The checkpoints of a folder that may be averaged: a run directory of ours, or a model directory of the original."""

import logging
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import yaml

from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.run.pickles import PickleFile

log = logging.getLogger(__name__)
SUMS = "sum.safetensors"  # of all weights so far, beside those of a checkpoint
OPTIONS = {"ema.safetensors": "trainer.ema=0.999", SUMS: "trainer.running_sum=true"}


@dataclass(frozen=True)
class Candidate:
    """A file of weights, and what is known of it. damage: reads it, and says what is wrong with it."""

    path: Path
    step: int
    epoch: int
    losses: Mapping[str, float]
    corruption: Callable[[], str | None]

    @property
    def age(self) -> tuple[int, int, str]:
        return (
            self.epoch,
            self.step,
            self.path.name,
        )  # the original's epoch_0_whole.pt comes after epoch_0_step_100.pt

    @property
    def checkpoint(self) -> Path:
        """A folder of ours, or a file of the original."""
        return self.path.parent if self.path.suffix == ".safetensors" else self.path

    @property
    def sums(self) -> Path:
        return self.path.with_name(SUMS)


@dataclass(frozen=True)
class CheckpointFolder:
    """oldest first. file: what an average of them is called."""

    folder: Path
    file: str
    found: list[Candidate]


def candidates_in(folder: Path, *, ema: bool = False, sums: bool = False) -> CheckpointFolder:
    """All checkpoints of a folder; UserError where it is neither a run nor a model directory of the original.

    ema: their running means instead of their weights. sums: with their running sums.
    """
    if ema and sums:
        raise UserError(
            "select=ema and method=running are two means of their own: give one of them"
        )
    if (run := RunDirectory(folder)).exists:
        return _of_run(run, ema, sums)
    if not any(folder.glob("epoch_*.pt")):
        raise UserError(
            f"{folder} is no run directory (it has no config.yaml), nor has it checkpoints of the original (epoch_*.pt): "
            f"name one that cosyexp.train wrote"
        )
    if ema or sums:
        raise UserError(
            f"{folder} is a model directory of the original, which keeps weights alone: give another select= or method="
        )
    return _of_original(folder)


def _of_run(run: RunDirectory, ema: bool, sums: bool) -> CheckpointFolder:
    model = f"{run.config().model.name}.safetensors"
    needed = ["ema.safetensors" if ema else model, *([SUMS] if sums else [])]
    found = run.checkpoints.all()
    able = [
        checkpoint
        for checkpoint in found
        if all(name in checkpoint.meta["sha256"] for name in needed)
    ]
    if found and not able:
        name = needed[-1]
        remedy = (
            f"train with {OPTIONS[name]}, or choose otherwise"
            if name in OPTIONS
            else "restore them"
        )
        raise UserError(f"{run} has no checkpoint with {name}: {remedy}")
    candidates = [
        Candidate(
            c.path / needed[0],
            c.step,
            int(c.meta.get("epoch", 0)),
            c.losses,
            partial(c.corruption, *needed),
        )
        for c in able
    ]
    return CheckpointFolder(run.path, model, candidates)


def _of_original(folder: Path) -> CheckpointFolder:
    """`epoch_E_whole.pt` and `epoch_E_step_S.pt`, each with the scores of the YAML of its own name; `init` and `train` are none."""
    found = []
    for path in folder.glob("epoch_*.pt"):
        if not (match := re.fullmatch(r"epoch_(\d+)_(?:whole|step_(\d+))\.pt", path.name)):
            continue
        try:
            known = _noted(path)
            step = int(known.get("step", match[2]))
            found.append(
                Candidate(path, step, int(match[1]), _scores(known), partial(_damage, path))
            )
        except (UserError, TypeError, ValueError):
            log.warning(
                "%s is passed over: neither it nor a YAML beside it says of what step it is", path
            )
    for note in sorted(folder.glob("epoch_*.yaml")):
        if not note.with_suffix(".pt").exists():
            log.warning("%s is passed over: there is no %s", note, note.with_suffix(".pt").name)
    return CheckpointFolder(folder, "model.pt", sorted(found, key=lambda candidate: candidate.age))


def _noted(path: Path) -> Mapping[str, Any]:
    """What the YAML of a checkpoint says; without one, its own step."""
    try:
        noted = yaml.safe_load(path.with_suffix(".yaml").read_text())
        if isinstance(noted, Mapping):
            return noted
        log.warning("%s is no mapping: its scores are not known", path.with_suffix(".yaml"))
    except FileNotFoundError:
        pass
    except (yaml.YAMLError, UnicodeDecodeError):
        log.warning("%s cannot be read: its scores are not known", path.with_suffix(".yaml"))
    with PickleFile(path) as file:
        return file.progress


def _scores(noted: Mapping[str, Any]) -> dict[str, float]:
    scores = noted.get("loss_dict")
    return (
        {str(k): float(v) for k, v in scores.items() if isinstance(v, int | float)}
        if isinstance(scores, Mapping)
        else {}
    )


def _damage(path: Path) -> str | None:
    """torch itself does not look at the checksums of what it reads."""
    try:
        with ZipFile(path) as archive:
            return "it is not what was written" if archive.testzip() else None
    except (
        BadZipFile,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        zlib.error,
    ):  # whatever a flipped bit may lead to
        return "it is cut short, or not the zip archive that torch.save writes"
