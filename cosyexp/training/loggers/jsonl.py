"""The logger jsonl: `metrics.jsonl` in the run directory, with one JSON object per line."""

import json
from collections.abc import Mapping

from cosyexp.objectives.base import Audio, SpectrogramImage
from cosyexp.registry import register
from cosyexp.run.documents import read_json_lines
from cosyexp.run.files import append, finite, replace_file
from cosyexp.training.loggers.base import RunInfo


@register("logger")
class JsonLines:
    """Writes lines of `step`, `epoch` and flat keys such as `train/loss`.

    Values that are not finite are null. On resume, the lines after the step of the checkpoint are
    dropped, as they will be logged again.
    """

    def start(self, info: RunInfo) -> None:
        """Opens the file, with the intact lines up to the resumed step."""
        path = info.directory.file("metrics.jsonl")
        with replace_file(path) as file:
            for line, values in read_json_lines(path) if path.exists() else ():
                step = values.get("step") if isinstance(values, dict) else None
                if isinstance(step, int) and step <= info.resumed_step:
                    file.write(line.strip().encode() + b"\n")
        self._file = append(path)

    def log_metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Writes a line."""
        self._file.write(json.dumps({"step": step, "epoch": epoch, **finite(values)}) + "\n")

    def log_media(self, step: int, name: str, media: SpectrogramImage | Audio) -> None:
        """Ignores media."""

    def flush(self) -> None:
        """Writes what is buffered."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
