"""The logger mlflow: MLflow tracking."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.training.loggers.base import BufferedLogger, RunInfo


@register("logger")
class MLflow(BufferedLogger):
    """Logs metrics and hyper-parameters to MLflow; a resumed run continues the same MLflow run.

    Args:
        experiment: name of the experiment.
        tracking_uri: a folder, or the URI of a server or a database.

    Raises:
        UserError: mlflow is not installed.
    """

    name = "mlflow"

    def __init__(self, *, experiment: str = "cosyexp", tracking_uri: str = "runs/mlflow") -> None:
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ModuleNotFoundError:
            raise UserError(
                "logger=mlflow needs a package that is not installed: pip install 'cosyexp[mlflow]'"
            ) from None
        uri = tracking_uri
        if ":" not in uri:
            # MLflow keeps its file store for those who ask for it
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(uri).absolute().as_uri()
        self._metric: Any = Metric
        self._param: Any = Param
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._experiment = experiment

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        """Creates an MLflow run, or takes the one with an id."""
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return run_id
        found = self._client.get_experiment_by_name(self._experiment)
        number = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._id = str(self._client.create_run(number, run_name=info.name).info.run_id)
        params = [self._param(key, str(value)) for key, value in info.hparams.items()]
        self._client.log_batch(self._id, params=params)
        return self._id

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the record of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Sends the current record and ends the run."""
        super().close()
        self._client.set_terminated(self._id)
