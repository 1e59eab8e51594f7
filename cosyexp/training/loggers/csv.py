"""The logger csv: `metrics.csv` in the run directory, with one row per step."""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from cosyexp.objectives.base import Audio, SpectrogramImage
from cosyexp.registry import register
from cosyexp.run.documents import DamagedFileError, read_lines
from cosyexp.run.files import finite, write_text
from cosyexp.training.loggers.base import RunInfo


@register("logger")
class Csv:
    """A table with a column for every name; it is rewritten at each checkpoint and at the end.

    The cells of values that are not finite are empty.
    On resume the rows after the step of the checkpoint are dropped, as they will come again.
    """

    def start(self, info: RunInfo) -> None:
        """Reads the rows up to the resumed step.

        Raises:
            UserError: the file is damaged.
        """
        self._path: Path = info.directory.file("metrics.csv")
        self._rows: dict[int, dict[str, float | str]] = {}
        if self._path.exists():
            for row in csv.DictReader(read_lines(self._path)):
                step = row.get("step") or ""
                if not re.fullmatch(r"\d{1,18}", step):
                    raise DamagedFileError(self._path, f"{step[:20]!r} is not a step")
                if int(step) <= info.resumed_step:
                    self._rows[int(step)] = {k: v for k, v in row.items() if k and v}

    def log_metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Adds values to the row of a step."""
        self._rows.setdefault(step, {"step": step, "epoch": epoch}).update(finite(values))

    def log_media(self, step: int, name: str, media: SpectrogramImage | Audio) -> None:
        """Ignores media."""

    def flush(self) -> None:
        """Writes the file."""
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        content = io.StringIO()
        writer = csv.DictWriter(content, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows.values())
        write_text(self._path, content.getvalue())

    def close(self) -> None:
        """Writes the file."""
        self.flush()
