"""The logger trackio: a local dashboard with the API of Weights & Biases."""

import secrets
from collections.abc import Mapping
from typing import Any

from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.training.loggers.base import BufferedLogger, RunInfo


@register("logger")
class Trackio(BufferedLogger):
    """Logs metrics to trackio's local database; a resumed run continues the same trackio run.

    Args:
        project: name of the project, as in `trackio show --project`.

    Raises:
        UserError: trackio is not installed.
    """

    name = "trackio"

    def __init__(self, *, project: str = "cosyexp") -> None:
        try:
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
        except ModuleNotFoundError:
            raise UserError(
                "logger=trackio needs a package that is not installed: pip install "
                "'cosyexp[trackio]'"
            ) from None
        self._trackio: Any = trackio
        self._storage: Any = SQLiteStorage
        self._project = project

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        """Starts a run, or resumes the one of this name."""
        name = run_id or f"{info.name}-{secrets.token_hex(3)}"  # trackio resumes runs by name
        self._run = self._trackio.init(
            project=self._project, name=name, config=dict(info.hparams), resume="allow"
        )
        # trackio writes in the background, so a killed run may have sent more than was stored
        stored = self._storage.get_max_step_for_run(self._project, name)
        if stored != self._sent["step"]:
            self._sent |= {"step": -1 if stored is None else stored, "names": []}
        return name

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the record of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Sends the current record and finishes the run."""
        super().close()
        self._run.finish()
