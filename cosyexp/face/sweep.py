"""Sweeps: names their jobs by what is varied, and prints one table of them, also when one failed."""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

import cosyexp.face.door  # noqa: F401

FOLDERS: list[Path] = []  # of the sweep that this process started


class Sweep(Callback):
    """Jobs write `<sweep>/jobs/N.json` when they end; a job that has none was stopped or killed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        task, hydra = list(config.hydra.overrides.task), config.hydra.overrides.hydra
        overrides = OverridesParser.create().parse_overrides(task)
        fixed = [override.get_key_element() for override in overrides if not override.is_sweep_override()]
        skipped = [*config.hydra.job.config.override_dirname.exclude_keys, *fixed]
        tag = f"{zlib.crc32(json.dumps(sorted(task)).encode()):08x}"
        with read_write(config), open_dict(config):  # a job is composed anew from these overrides, perhaps on another node
            config.hydra.sweep.dir = f"{config.hydra.sweep.dir}/{tag}"  # the same sweep, the same folder
            hydra.append(f"hydra.sweep.dir={config.hydra.sweep.dir}")
            hydra.append(f"hydra.job.config.override_dirname.exclude_keys={json.dumps(skipped)}")
        FOLDERS.append(Path(config.hydra.sweep.dir))
        shutil.rmtree(FOLDERS[-1] / "jobs", ignore_errors=True)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode.name != "MULTIRUN":
            return
        path = Path(config.hydra.sweep.dir) / "jobs" / f"{config.hydra.job.num}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "overrides": " ".join(config.hydra.overrides.task),
            "status": job_return.status.name.lower(),
            "value": str(job_return._return_value),
            "run_dir": str(config.get("run_dir", "")),
        }
        path.write_text(json.dumps(row) + "\n")


def print_table() -> None:
    """The jobs of this process's sweep that have ended."""
    while FOLDERS:
        paths = sorted(FOLDERS.pop().glob("jobs/*.json"), key=lambda path: int(path.stem))
        rows = [["job", "status", "overrides", "result", "run_dir"]]
        for path in paths:
            row = json.loads(path.read_text())
            rows.append([path.stem, row["status"], row["overrides"], row["value"].splitlines()[0], row["run_dir"]])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows if paths else []:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
