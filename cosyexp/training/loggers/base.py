"""The logger protocol: a destination of metrics, spectrograms and audio.

To add a logger, write a class as those in this package, and a YAML in `conf/logger/`. Loggers run
on rank 0 only. The trainer calls `start` once, `log_metrics` and `log_media` during the training,
`flush` before each checkpoint, and `close` at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cosyexp.errors import UserError
from cosyexp.objectives.base import Audio, SpectrogramImage
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import Fields, read_json
from cosyexp.run.files import write_json


@dataclass(frozen=True)
class RunInfo:
    """Information on a run for its loggers.

    Attributes:
        directory: the run directory.
        hparams: settings of the command line, without paths.
        resumed_step: step at which the run is resumed; -1 for a new run. What was logged after that
            step will be logged again.
        changed: whether a resumed run goes on with other settings (`resume.change`), so that the
            values of these steps differ from those that were logged before.
    """

    directory: RunDirectory
    hparams: Mapping[str, str | float | bool]
    resumed_step: int
    changed: bool = False

    @property
    def name(self) -> str:
        """Last two parts of the run directory, such as `demo-llm`."""
        return "-".join(self.directory.path.absolute().parts[-2:])


class Logger(Protocol):
    """Protocol of loggers; every step must be logged once, even if a run was killed."""

    def start(self, info: RunInfo) -> None:
        """Opens the destination."""
        ...

    def log_metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Logs values by name; may be called several times in a step, with different names."""
        ...

    def log_media(self, step: int, name: str, media: SpectrogramImage | Audio) -> None:
        """Logs a spectrogram or audio."""
        ...

    def flush(self) -> None:
        """Sends what is buffered."""
        ...

    def close(self) -> None:
        """Sends what is buffered and closes the destination."""
        ...


class BufferedLogger:
    """Base class of loggers that send one record per step to a service that cannot be rewound.

    A resumed run logs the steps after its checkpoint again. As their values are the same to the
    last bit, what was sent before is skipped: `<run_dir>/loggers/<name>.json` holds the last step
    that was sent, with the names of its values, and the id of the service's run. If settings have
    changed, the values differ, and a new run of the service begins. A service that
    writes in the background may lack the last seconds before a process was killed; metrics.jsonl
    has them.
    """

    name: str

    def start(self, info: RunInfo) -> None:
        """Reads which step an earlier process sent last, and connects.

        Raises:
            UserError: the connection fails, or the file is damaged.
        """
        self._path: Path = info.directory.file("loggers", f"{self.name}.json")
        self._sent: dict[str, Any] = {"step": -1, "names": []}
        if self._path.exists():
            fields = Fields(read_json(self._path), self._path)
            step, names = fields.whole("step", low=-1), fields.texts("names")
            if not (info.changed and step > info.resumed_step):
                self._sent |= {"step": step, "names": names, "id": fields.text("id")}
        self._step, self._values = -1, dict[str, float]()
        try:
            self._sent["id"] = self.connect(info, self._sent.get("id"))
        except Exception as error:
            raise UserError(f"logger={self.name} cannot start: {error}") from error
        write_json(self._path, self._sent)

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        """Opens a new run, or the one with an id, and returns its id."""
        raise NotImplementedError

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the record of a step."""
        raise NotImplementedError

    def log_metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Adds values to the record of a step; the records of earlier steps are sent."""
        self.at_step(step)
        self._values |= {"epoch": epoch, **values}

    def log_media(self, step: int, name: str, media: SpectrogramImage | Audio) -> None:
        """Ignores media."""

    def at_step(self, step: int) -> None:
        """Sends the record of an earlier step."""
        if step != self._step:
            self.flush()
        self._step = step

    def flush(self) -> None:
        """Sends the current record, without what was sent of its step before."""
        known = self._sent["names"] if self._step == self._sent["step"] else []
        values = {name: value for name, value in self._values.items() if name not in known}
        if values.keys() - {"epoch"} and self._step >= self._sent["step"]:
            self.send(self._step, values)
            self._sent |= {"step": self._step, "names": [*known, *values]}
            write_json(self._path, self._sent)
        self._values = {}

    def close(self) -> None:
        """Sends the current record."""
        self.flush()
