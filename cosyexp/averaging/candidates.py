"""Finds the checkpoints that can be averaged.

The folder is a run directory, or a model directory of the original CosyVoice (`epoch_*.pt`).
"""

import logging
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import DamagedFileError, read_yaml
from cosyexp.run.pickles import PickleFile

log = logging.getLogger(__name__)
# Sum of the weights after every step so far, in the folder of a checkpoint.
SUMS = "sum.safetensors"
ALIASES = 16  # in a YAML of the original
OPTIONS = {"ema.safetensors": "trainer.ema=0.999", SUMS: "trainer.running_sum=true"}


@dataclass(frozen=True)
class Candidate:
    """A file of weights, with its step, epoch and validation.

    Attributes:
        path: file of weights.
        step: number of optimizer steps.
        epoch: number of epochs.
        losses: validation losses and metrics by name.
        validation: fingerprint of the data that they were measured on; None if it is not known.
        corruption: reads the file, and returns what is wrong with it; None if it is intact.
    """

    path: Path
    step: int
    epoch: int
    losses: Mapping[str, float]
    validation: str | None
    corruption: Callable[[], str | None]

    @property
    def age(self) -> tuple[int, int, str]:
        """Sort key from the oldest to the newest checkpoint."""
        # By name, epoch_0_whole.pt of the original comes after epoch_0_step_100.pt.
        return (self.epoch, self.step, self.path.name)

    @property
    def checkpoint(self) -> Path:
        """The folder of a checkpoint, or the file of the original."""
        return self.path.parent if self.path.suffix == ".safetensors" else self.path

    @property
    def untrained(self) -> bool:
        """Whether it is step 0 of a run; the original's initial weights are not a candidate."""
        return self.step == 0 and self.path.suffix == ".safetensors"

    @property
    def sums(self) -> Path:
        """File of the running sums of the checkpoint."""
        return self.path.with_name(SUMS)


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of a folder.

    Attributes:
        folder: the run directory, or the model directory of the original.
        file: file name of an average of them.
        found: the checkpoints, oldest first.
    """

    folder: Path
    file: str
    found: list[Candidate]


def candidates_in(folder: Path, *, ema: bool = False, sums: bool = False) -> CheckpointFolder:
    """Returns all checkpoints of a folder.

    Args:
        folder: the run directory, or the model directory of the original.
        ema: take the exponential moving average of each checkpoint instead of its weights.
        sums: take only checkpoints that have running sums.

    Raises:
        UserError: the folder is neither of the two, no checkpoint has the files that are asked
            for, or both are asked for.
    """
    if ema and sums:
        raise UserError(
            "select=ema and method=running are two different averages: give one of them"
        )
    if (run := RunDirectory(folder)).exists:
        return _of_run(run, ema, sums)
    if not any(folder.glob("epoch_*.pt")):
        raise UserError(
            f"{folder} is not a run directory (it has no config.yaml) and has no checkpoints of "
            f"the original (epoch_*.pt): name one that cosyexp.train wrote"
        )
    if ema or sums:
        raise UserError(
            f"{folder} is a model directory of the original, which keeps weights alone: give "
            f"another select= or method="
        )
    return _of_original(folder)


def _of_run(run: RunDirectory, ema: bool, sums: bool) -> CheckpointFolder:
    model = run.config().weights_file
    needed = ["ema.safetensors" if ema else model, *([SUMS] if sums else [])]
    found = run.checkpoints.all()
    complete = [
        checkpoint
        for checkpoint in found
        if all(name in checkpoint.meta["sha256"] for name in needed)
    ]
    if found and not complete:
        name = needed[-1]
        remedy = (
            f"train with {OPTIONS[name]}, or give another select= or method="
            if name in OPTIONS
            else "restore the file"
        )
        raise UserError(f"{run} has no checkpoint with {name}: {remedy}")
    candidates = [
        Candidate(
            c.path / needed[0],
            c.step,
            c.meta["epoch"],
            c.losses,
            c.validation,
            partial(c.corruption, *needed),
        )
        for c in complete
    ]
    return CheckpointFolder(run.path, model, candidates)


def _of_original(folder: Path) -> CheckpointFolder:
    """Finds `epoch_E_whole.pt` and `epoch_E_step_S.pt`, with the losses in the YAML of that name.

    Other files, such as `init.pt`, are ignored.
    """
    found = []
    for path in folder.glob("epoch_*.pt"):
        if not (match := re.fullmatch(r"epoch_(\d+)_(?:whole|step_(\d+))\.pt", path.name)):
            continue
        try:
            info = _info(path)
            step = int(info.get("step", match[2]))
            losses, epoch = _losses(info), int(match[1])
            found.append(Candidate(path, step, epoch, losses, None, partial(_corruption, path)))
        except (UserError, TypeError, ValueError):
            log.warning("%s is skipped: its step is neither in the file nor in a YAML", path)
    for path in sorted(folder.glob("epoch_*.yaml")):
        if not path.with_suffix(".pt").exists():
            log.warning("%s is skipped: there is no %s", path, path.with_suffix(".pt").name)
    return CheckpointFolder(folder, "model.pt", sorted(found, key=lambda candidate: candidate.age))


def _info(path: Path) -> Mapping[str, Any]:
    """Returns the content of a checkpoint's YAML; without one, the step in the checkpoint."""
    try:
        info = read_yaml(path.with_suffix(".yaml"), ALIASES)
        if isinstance(info, Mapping):
            return info
        log.warning("%s is not a mapping: its losses are not known", path.with_suffix(".yaml"))
    except FileNotFoundError:
        pass
    except DamagedFileError as error:
        message = "%s cannot be read (%s): its losses are not known"
        log.warning(message, error.path, error.reason)
    with PickleFile(path) as file:
        return file.progress


def _losses(info: Mapping[str, Any]) -> dict[str, float]:
    losses = info.get("loss_dict")
    return (
        {str(k): float(v) for k, v in losses.items() if isinstance(v, int | float)}
        if isinstance(losses, Mapping)
        else {}
    )


def _corruption(path: Path) -> str | None:
    """Checks the checksums of a zip archive, which torch does not, and returns what is wrong."""
    try:
        with ZipFile(path) as archive:
            return "it is not what was written" if archive.testzip() else None
    # A flipped bit can lead to any of these.
    except (BadZipFile, EOFError, OSError, RuntimeError, ValueError, zlib.error):
        return "it is cut short, or not the zip archive that torch.save writes"
