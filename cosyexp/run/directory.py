"""The run directory: the one place that knows where everything of a run lies."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import yaml

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import Checkpoints
from cosyexp.run.files import write_text

# what a resume may change: it moves the run, or says how long, where and how often, but not what is learned
CHANGEABLE = (
    "run_dir",
    "init_from",
    "init_strict",
    "data.speakers",
    "family.tokenizer.folder",  # the same files at another place; other ids of a text make other data, which are refused
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
    "data.workers",
    "data.processes",
)


class RunDirectory:
    """`<run>/`: config.yaml, overrides.yaml, environment.json, metrics.jsonl, logs/, tensorboard/, checkpoints/, averages/, exports/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.metrics = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self.averages = self.path / "averages"
        self.exports = self.path / "exports"
        self.reference = self.path / "reference"
        self.speakers = self.path / "speakers.safetensors"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        return (self.path / "config.yaml").exists()

    def config(self) -> dict[str, Any]:
        """The run's whole configuration; UserError where this folder is no run."""
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self} is no run directory (it has no config.yaml): name one that cosyexp.train wrote"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
        if not isinstance(config, dict) or any(
            not isinstance(config.get(part), dict) for part in ("family", "model", "network")
        ):
            raise UserError(
                f"{self}/config.yaml is not the YAML of a run: restore it, or train anew"
            )
        return config

    def refuse_other(self, config: Mapping[str, Any]) -> None:
        """UserError where this run was begun with a config that a resume may not change into this one."""
        before, now = dict(flat(self.config())), dict(flat(config))
        for key in sorted(
            {*before, *now}, key=lambda key: (not key.endswith(".name"), key)
        ):  # another model differs in much
            if before.get(key) != now.get(key) and not any(
                fnmatch(key, pattern) for pattern in CHANGEABLE
            ):
                raise UserError(
                    f"{self} was begun with {key}={before.get(key)}, not {now.get(key)}: "
                    f"repeat the old value to resume it, or give another run_dir="
                )

    def write_config(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        write_text(
            self.path / "config.yaml",
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        )
        write_text(
            self.path / "overrides.yaml", yaml.safe_dump(list(overrides), allow_unicode=True)
        )

    def lock(self) -> IO[str]:
        """Holds the run for this process as long as the returned file is open."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / ".lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"another process is training in {self}: wait for it, or give another run_dir="
            ) from None
        os.register_at_fork(
            after_in_child=file.close
        )  # workers may outlive this process, and must not hold its run
        return file


def newest_run(root: str = "runs") -> RunDirectory:
    """The run under `root` whose checkpoints changed last."""
    found = [
        (os.path.getmtime(path.parent / "checkpoints"), path.parent)
        for path in Path(root).rglob("config.yaml")
        if (path.parent / "checkpoints").is_dir()
    ]
    if not found:
        raise UserError(f"there is no run under {root}/: train one, or give run_dir=")
    return RunDirectory(max(found)[1])


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping as ("a.b", value)."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
