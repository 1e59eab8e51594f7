"""Sweeps: names their jobs by what is varied, and makes one table of them, also when one failed.

`<sweep>/jobs/N.json` is what a job says of itself when it begins and when it ends; `<sweep>/sweep.csv` is all of them.
"""

import csv
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from cosyexp.cli.errors import user_message
from cosyexp.distributed import rank_environment

FOLDERS: list[Path] = []  # of the sweep that this process started
FIRST, LAST = (
    ("job", "status", "overrides"),
    ("time", "run_dir", "error"),
)  # the columns around what a task tells
TOLD: dict[str, Any] = {}  # what the job at hand says besides its result


class Sweep(Callback):
    """The folder of a sweep follows from its words alone: the same sweep, the same folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        task, hydra = list(config.hydra.overrides.task), config.hydra.overrides.hydra
        overrides = OverridesParser.create().parse_overrides(task)
        fixed = [
            override.get_key_element() for override in overrides if not override.is_sweep_override()
        ]
        skipped = [*config.hydra.job.config.override_dirname.exclude_keys, *fixed]
        tag = f"{zlib.crc32(json.dumps(sorted(task)).encode()):08x}"
        with (
            read_write(config),
            open_dict(config),
        ):  # a job is composed anew from these overrides, perhaps on another node
            config.hydra.sweep.dir = f"{config.hydra.sweep.dir}/{tag}"
            hydra.append(f"hydra.sweep.dir={config.hydra.sweep.dir}")
            hydra.append(f"hydra.job.config.override_dirname.exclude_keys={json.dumps(skipped)}")
        FOLDERS.append(Path(config.hydra.sweep.dir))
        shutil.rmtree(FOLDERS[-1] / "jobs", ignore_errors=True)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if first_of_a_sweep(config):
            words, run_dir = " ".join(config.hydra.overrides.task), str(config.get("run_dir", ""))
            said = {
                "status": "unfinished",
                "overrides": words,
                "run_dir": run_dir,
                "began": time.time(),
            }
            note(config.hydra.sweep.dir, config.hydra.job.num, **said)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if not first_of_a_sweep(config):
            return
        value, failed = job_return._return_value, job_return.status.name == "FAILED"
        result = {"error": sentence(value)} if failed else dict(TOLD) or {"result": str(value)}
        TOLD.clear()
        note(
            config.hydra.sweep.dir,
            config.hydra.job.num,
            status=job_return.status.name.lower(),
            **result,
        )


def first_of_a_sweep(config: DictConfig) -> bool:
    """Whether this is a job of a sweep, and the rank that speaks for it."""
    return (
        config.hydra.mode.name == "MULTIRUN"
        and rank_environment(os.environ).get("RANK", "0") == "0"
    )


def tell(**facts: Any) -> None:
    """What the task that is about to end wants to see in the table of its sweep."""
    TOLD.update(facts)


def note(sweep: str, job: int, **said: Any) -> None:
    """Adds to what a job says; `time` is in seconds since its first start."""
    path = Path(sweep) / "jobs" / f"{job}.json"
    row = json.loads(path.read_text()) if path.exists() else {}
    row = {**row, **said, **({"began": row["began"]} if "began" in row else {})}
    if "began" in row:
        row["time"] = round(time.time() - row["began"], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row) + "\n")
    os.replace(part, path)


def sentence(error: BaseException) -> str:
    """What ended a job, in one line."""
    return " ".join((user_message(error) or f"{type(error).__name__}: {error}").splitlines())


def varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The words of each job that not all have."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in words if word not in common) for words in jobs]


def table_of(folder: Path) -> list[list[Any]]:
    """What the jobs of a sweep said, below the names of the columns; those in which nobody said anything are left out."""
    paths = sorted(folder.glob("jobs/*.json"), key=lambda path: int(path.stem))
    rows = [{"job": path.stem, **json.loads(path.read_text())} for path in paths]
    for row, words in zip(
        rows, varying([row["overrides"].split(" ") for row in rows]), strict=True
    ):
        row["overrides"] = words
    told = [key for row in rows for key in row if key not in FIRST + LAST + ("began",)]
    names = [
        name
        for name in (*FIRST, *dict.fromkeys(told), *LAST)
        if any(row.get(name) not in (None, "") for row in rows)
    ]
    return [names, *([row.get(name) for name in names] for row in rows)]


def print_table() -> None:
    """The jobs of this process's sweep that have begun; also into `sweep.csv`."""
    while FOLDERS:
        folder = FOLDERS.pop()
        table = table_of(folder)
        if len(table) == 1:
            continue
        shown = [
            [
                "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell)
                for cell in row
            ]
            for row in table
        ]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for row in shown:
            print(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows(table)
        (folder / "sweep.csv").write_text(content.getvalue())
        print(f"this table is also {folder}/sweep.csv")
