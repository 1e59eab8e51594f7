"""The logger jsonl: `metrics.jsonl` in the run directory, with one JSON object per line."""

import json
import os
from collections.abc import Mapping

from cosyexp.objectives.base import Audio, SpectrogramImage
from cosyexp.registry import register
from cosyexp.run.files import finite
from cosyexp.training.loggers.base import RunInfo


@register("logger")
class JsonLines:
    """Writes lines of `step`, `epoch` and flat keys such as `train/loss`.

    Values that are not finite are null. On resume, the lines after the step of the checkpoint are
    dropped, as they will be logged again.
    """

    def start(self, info: RunInfo) -> None:
        """Opens the file and cuts it back to the resumed step."""
        path = info.directory.metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] <= info.resumed_step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                break  # cut short by a kill
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        os.replace(part, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

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
