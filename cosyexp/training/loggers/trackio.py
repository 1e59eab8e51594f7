"""trackio: a local dashboard with the API of Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.training.loggers.base import BufferedLogger, RunInfo


@register("logger")
class Trackio(BufferedLogger):
    """Logs metrics to trackio's local database; a resumed run goes on in the same trackio run.

    Args:
        project: name of the project, as in `trackio show --project`.

    Raises:
        UserError: trackio is not installed.
    """

    name = "trackio"

    def __init__(self, *, project: str = "cosyexp") -> None:
        try:
            import trackio
        except ModuleNotFoundError:
            raise UserError(
                "logger=trackio needs a package that is not installed: pip install "
                "'cosyexp[trackio]'"
            ) from None
        self._trackio: Any = trackio
        self._project = project

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        """Starts a run, or resumes the one of this name."""
        name = run_id or info.name
        self._run = self._trackio.init(
            project=self._project, name=name, config=dict(info.hparams), resume="allow"
        )
        return str(name)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the record of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Sends the record at hand and finishes the run."""
        super().close()
        self._run.finish()
