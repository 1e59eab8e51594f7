"""Sweeps: a folder for the jobs of a sweep, and a table of all of them, failed ones included.

Each job writes `<sweep>/jobs/N.json` when it starts and when it ends, so that nothing is lost with
the process that waits for them. `<sweep>/sweep.csv` holds the table.
"""

import csv
import io
import json
import os
import re
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
from cosyexp.errors import UserError
from cosyexp.run.documents import Fields, read_json
from cosyexp.run.files import below, write_json, write_text
from cosyexp.run.folders import remove_tree

# columns of the table before and after those that a task reports
FIRST_COLUMNS = ("job", "status", "overrides")
LAST_COLUMNS = ("time", "run_dir", "error")

_sweep_dirs: list[Path] = []  # of the sweep that this process started
_reported: dict[str, Any] = {}  # by the job that is running


class SweepCallback(Callback):
    """Hydra callback that names a sweep's folder after its overrides and records its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Names the folder by a hash of the overrides, and each job by those that vary."""
        task, hydra = list(config.hydra.overrides.task), config.hydra.overrides.hydra
        overrides = OverridesParser.create().parse_overrides(task)
        # Hydra excludes by this name, without a + before or an @package behind it
        swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
        fixed = [key for o in overrides if (key := o.key_or_group) not in swept]
        excluded = [*config.hydra.job.config.override_dirname.exclude_keys, *fixed]
        tag = f"{zlib.crc32(json.dumps(sorted(task)).encode()):08x}"
        # a job is composed anew from these overrides, perhaps on another node
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = f"{config.hydra.sweep.dir}/{tag}"
            hydra.append(f"hydra.sweep.dir={config.hydra.sweep.dir}")
            hydra.append(f"hydra.job.config.override_dirname.exclude_keys={json.dumps(excluded)}")
        _sweep_dirs.append(Path(config.hydra.sweep.dir))
        remove_tree(below(_sweep_dirs[-1], "jobs"))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Records that a job has started."""
        if _is_recorded(config):
            record_job(
                config.hydra.sweep.dir,
                config.hydra.job.num,
                status="unfinished",
                overrides=" ".join(config.hydra.overrides.task),
                run_dir=str(config.get("run_dir", "")),
                began=time.time(),
            )

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Records how a job has ended."""
        if not _is_recorded(config):
            return
        value, failed = job_return._return_value, job_return.status.name == "FAILED"
        result = {"error": one_line(value)} if failed else dict(_reported) or {"result": str(value)}
        _reported.clear()
        status = job_return.status.name.lower()
        record_job(config.hydra.sweep.dir, config.hydra.job.num, status=status, **result)


def _is_recorded(config: DictConfig) -> bool:
    """Returns whether this process is rank 0 of a job of a sweep."""
    rank = rank_environment(os.environ).get("RANK", "0")
    return config.hydra.mode.name == "MULTIRUN" and rank == "0"


def report(**values: Any) -> None:
    """Adds columns for the running job to the table of its sweep."""
    _reported.update(values)


def record_job(sweep_dir: str, job: int, **values: Any) -> None:
    """Updates the record of a job; `time` is in seconds since its first start."""
    path = below(sweep_dir, "jobs", f"{job}.json")
    row = read_row(path) if path.exists() else {}
    row = {**row, **values, **({"began": row["began"]} if "began" in row else {})}
    if "began" in row:
        row["time"] = round(time.time() - row["began"], 1)
    write_json(path, row)


def read_row(path: Path) -> dict[str, Any]:
    """Returns the record of a job.

    Raises:
        UserError: it is damaged.
    """
    fields = Fields(read_json(path), path)
    if "began" in fields.content:
        fields.number("began")
    fields.text("overrides", "")
    return fields.content


def one_line(error: BaseException) -> str:
    """Returns the message of an error, in one line."""
    return " ".join((user_message(error) or f"{type(error).__name__}: {error}").splitlines())


def varying_overrides(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Returns the overrides of each job that are not common to all jobs."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in words if word not in common) for words in jobs]


def read_table(folder: Path) -> list[list[Any]]:
    """Returns the records of a sweep's jobs as rows, below a row of column names.

    Columns in which no job has a value are left out.
    """
    paths = [path for path in folder.glob("jobs/*.json") if re.fullmatch(r"\d{1,9}", path.stem)]
    rows = []
    for path in sorted(paths, key=lambda path: int(path.stem)):
        try:
            rows.append({"job": path.stem, **read_row(path)})
        except UserError as error:
            rows.append({"job": path.stem, "status": "unknown", "error": one_line(error)})
    overrides = varying_overrides([row.get("overrides", "").split(" ") for row in rows])
    for row, words in zip(rows, overrides, strict=True):
        row["overrides"] = words
    known = FIRST_COLUMNS + LAST_COLUMNS + ("began",)
    reported = dict.fromkeys(key for row in rows for key in row if key not in known)
    columns = [
        name
        for name in (*FIRST_COLUMNS, *reported, *LAST_COLUMNS)
        if any(row.get(name) not in (None, "") for row in rows)
    ]
    return [columns, *([row.get(name) for name in columns] for row in rows)]


def print_table() -> None:
    """Prints the jobs of this process's sweep, and writes them to `sweep.csv`."""
    while _sweep_dirs:
        folder = _sweep_dirs.pop()
        table = read_table(folder)
        if len(table) == 1:
            continue
        print_rows(table)
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows(table)
        write_text(below(folder, "sweep.csv"), content.getvalue())
        print(f"this table is also in {folder}/sweep.csv")


def print_rows(rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows as a table with aligned columns; a missing value is an empty cell."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
