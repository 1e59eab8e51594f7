"""A logger that writes a Markdown table of the losses."""

from collections.abc import Mapping
from typing import Any

from cosyexp.run.files import write_text
from cosyexp.training.loggers.base import RunInfo


class Markdown:
    """`<run_dir>/losses.md`: one row per step, in a run that is resumed too."""

    def start(self, info: RunInfo) -> None:
        """Reads the rows up to the resumed step."""
        self._path = info.directory.file("losses.md")
        self._rows: dict[int, str] = {}
        for line in self._path.read_text().splitlines()[2:] if self._path.exists() else ():
            step = int(line.split("|")[1])
            if step <= info.resumed_step:
                self._rows[step] = line

    def log_metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Keeps the training loss."""
        if "train/loss" in values:
            self._rows[step] = f"| {step} | {values['train/loss']:.4f} |"

    def log_media(self, step: int, name: str, media: Any) -> None:
        """Ignores media."""

    def flush(self) -> None:
        """Writes the table."""
        header = ["| step | loss |", "|---|---|"]
        write_text(self._path, "\n".join([*header, *self._rows.values()]) + "\n")

    def close(self) -> None:
        """Writes the table."""
        self.flush()
