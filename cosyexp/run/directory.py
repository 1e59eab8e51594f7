"""The run directory: the paths of all files of a run."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from omegaconf.errors import OmegaConfBaseException

from cosyexp.config import TrainConfig, parse, to_dict
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import Checkpoints
from cosyexp.run.documents import DamagedFileError, read_yaml
from cosyexp.run.files import append, below, refuse_links, write_yaml
from cosyexp.run.folders import locked, remove_partial_files, remove_partial_folders

log = logging.getLogger(__name__)

# The version of what a run directory holds: config, checkpoints, averages, exports. It changes
# when an older run can no longer be read as it was written.
FORMAT_VERSION = 1

# Keys that a resume may change: they move a run, or say how long, where and how often, but not
# what is learned.
CHANGEABLE = (
    "run_dir",
    "init_from",
    "init_strict",
    "init_extra",
    # the content of the training data decides; on other validation data the best starts anew
    "data.dir",
    "data.train",
    "data.valid",
    "data.speakers",
    # the same files at another place; other text ids make other data, which are refused
    "family.tokenizer.folder",
    "family.tokenizer.vocabulary",
    "trainer.steps",
    "trainer.epochs",
    "trainer.accumulate",
    "objective.accumulate",  # follows it
    "trainer.*_every",
    "trainer.valid_epochs",
    "trainer.previews",
    "trainer.on_nonfinite",
    "checkpoint.*",
    "engine.*",
    "logger*",
    "callbacks*",
    "metrics*",
    "data.workers",
    "data.processes",
)
# Keys that a resume changes if `resume.change` names them: no weight and no state depends on them.
CHANGEABLE_ON_REQUEST = re.compile(
    r"(.*optimizer\.(?!_target_|amsgrad|centered|momentum|fused|foreach|capturable).+"
    r"|.*scheduler\..+|objective\.(?!cache_reference)[a-z]\w*|model\.warmup"
    r"|trainer\.max_grad_norm)"
)
# Keys that belong to a command, not to a run; a run directory never says what is trusted.
OF_THE_COMMAND = ("trusted", "resume", "plan")
# The front ends that were fitted on the data, which keep them next to the speakers' embeddings.
FRONT_ENDS = ("speech_tokenizer.safetensors", "speaker_encoder.safetensors")
# What a training writes in its run directory.
WRITTEN = (
    *(f"{name}.*" for name in ("config", "overrides", "changes", "environment", "metrics")),
    *("speakers.safetensors*", *(f"{name}*" for name in FRONT_ENDS)),
    *("wandb", "tensorboard", "exports", "averages", ".lock"),
    *("checkpoints", "checkpoints/step_*", "averages/.lock"),
    *("logs", "loggers", "profile", "reference", "listen", "listen.html*"),
    *("logs/*", "loggers/*", "profile/*", "reference/*", "listen/*"),
)


class RunDirectory:
    """The files of a run.

    <run>/config.yaml  overrides.yaml  changes.yaml  environment.json  metrics.jsonl
          speakers.safetensors  speech_tokenizer.safetensors  speaker_encoder.safetensors
          checkpoints/  averages/  exports/  logs/  tensorboard/  reference/  loggers/
          listen.html  listen/
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path)
        self.metrics = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self.averages = self.path / "averages"
        self.exports = self.path / "exports"
        self.reference = self.path / "reference"
        self.listen = self.path / "listen"
        self.speakers = self.path / "speakers.safetensors"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether there is a run in this folder."""
        return (self.path / "config.yaml").exists()

    def config(self) -> TrainConfig:
        """Reads the run's whole config.

        Raises:
            UserError: the folder is not a run, its config is damaged, or another version of
                cosyexp wrote it.
        """
        path = self.path / "config.yaml"
        try:
            values = read_yaml(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self} is not a run directory (it has no config.yaml): name one that "
                f"cosyexp.train wrote"
            ) from None
        except DamagedFileError as error:
            raise UserError(
                f"{path} is not the YAML of a run ({error.reason}): restore it, or train again"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{path} is not the YAML of a run: restore it, or train again")
        version = values.pop("format_version", 0)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self} has format version {version}, this cosyexp reads {FORMAT_VERSION}: use "
                f"the version of cosyexp that wrote it (see its environment.json), or train again"
            )
        for key in OF_THE_COMMAND:
            values.pop(key, None)
        try:
            return parse(TrainConfig, values)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is not the config of a run ({reason}): restore it") from None

    def refuse_other(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Checks that this run may be resumed with a config.

        Returns:
            The old and the new value of each key that changes because `resume.change` names it.

        Raises:
            UserError: another key that changes what is learned differs.
        """
        before, now = dict(flat(_stored(self.config()))), dict(flat(_stored(config)))
        asked, changes = config.resume.change, dict[str, tuple[Any, Any]]()
        if unknown := [name for name in asked if not any(_is_part(key, name) for key in now)]:
            raise UserError(
                f"resume.change={unknown[0]} is not a key of this run: --cfg job shows all keys"
            )
        # another model differs in much: its name first; then optimizer.lr before what follows it
        for key in sorted(
            {*before, *now}, key=lambda key: (not key.endswith(".name"), key.count("."), key)
        ):
            old, new = before.get(key), now.get(key)
            if old == new or any(fnmatch(key, pattern) for pattern in CHANGEABLE):
                continue
            on_request = CHANGEABLE_ON_REQUEST.fullmatch(key) is not None
            if on_request and any(_is_part(key, name) for name in asked):
                changes[key] = (old, new)
                continue
            change = ", ".join([*asked, key])
            request = f"add resume.change=[{change}] to go on with the new, " if on_request else ""
            raise UserError(
                f"{self} was begun with {key}={old}, not {new}: repeat the old value to resume it, "
                f"{request}or give another run_dir="
            )
        return changes

    def record_changes(self, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds to `changes.yaml` which settings changed at a step of this run.

        Args:
            step: the step of the checkpoint that the run goes on from.
            changes: the old and the new value of each key.

        Raises:
            UserError: the file is damaged.
        """
        path = self.file("changes.yaml")
        known = read_yaml(path) if path.exists() else []
        if not isinstance(known, list):
            raise DamagedFileError(path, "it must be a list")
        values = {key: {"from": old, "to": new} for key, (old, new) in changes.items()}
        write_yaml(path, [*known, {"step": step, "changes": values}])

    def write_config(self, config: TrainConfig, overrides: Sequence[str]) -> None:
        """Writes the config, and the overrides of the command line that made it."""
        values = {"format_version": FORMAT_VERSION, **_stored(config)}
        write_yaml(self.file("config.yaml"), values)
        write_yaml(self.file("overrides.yaml"), list(overrides))

    def file(self, *names: str) -> Path:
        """Returns the path of a file or folder of the run that is to be written, see `below`."""
        return below(self.path, *names)

    def refuse_links(self) -> None:
        """Checks that nothing that a training writes is a symbolic link.

        Raises:
            UserError: the name of the first one that is.
        """
        refuse_links(self.path, *WRITTEN)

    def remove_partial(self) -> None:
        """Removes what killed processes left half-written; only the holder of the lock may.

        Averages and exports may be written meanwhile: they are left alone then.
        """
        self.checkpoints.remove_partial()
        for folder in (self.path, self.logs, self.path / "loggers", self.reference, self.listen):
            remove_partial_files(folder)
        if self.averages.is_dir():
            with locked(self.file("averages", ".lock"), wait=False) as held:
                if held:
                    remove_partial_folders(self.averages)
        for folder in self.exports.glob("*/"):
            if folder.is_symlink():
                continue
            with locked(folder, wait=False) as held:
                if held:
                    remove_partial_files(folder)

    def lock(self) -> IO[str]:
        """Locks the run for this process, for as long as the returned file is open.

        Raises:
            UserError: another process is training in this directory.
        """
        file = append(self.file(".lock"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another process is training in {self}: wait for it, or give another run_dir="
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): start no other process in it", self, error)
        # data workers may outlive this process, and must not hold the lock
        os.register_at_fork(after_in_child=file.close)
        return file


def voice_files(speakers: Path) -> dict[str, Path]:
    """Returns a file of speaker embeddings and the fitted front ends next to it, by their names."""
    front_ends = {name: speakers.with_name(name) for name in FRONT_ENDS}
    found = {name: path for name, path in front_ends.items() if path.exists()}
    return {"speakers.safetensors": speakers, **found}


def newest_run(root: str = "runs") -> RunDirectory:
    """Returns the run under `root` whose checkpoints changed last.

    Raises:
        UserError: there is no run.
    """
    found = [
        (os.path.getmtime(path.parent / "checkpoints"), path.parent)
        for path in Path(root).rglob("config.yaml")
        if (path.parent / "checkpoints").is_dir()
    ]
    if not found:
        raise UserError(f"there is no run under {root}/: train one, or give run_dir=")
    return RunDirectory(max(found)[1])


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a nested mapping as ("a.b", value)."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_part(key: str, name: str) -> bool:
    """Returns whether a key is `name`, below it, or follows it.

    `objective.discriminator_optimizer.lr` follows `optimizer.lr` and is below `optimizer`.
    """
    return re.search(rf"(^|[._]){re.escape(name)}(\.|$)", key) is not None


def _stored(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key not in OF_THE_COMMAND}
