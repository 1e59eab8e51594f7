"""The sweeper hydra/sweeper=optuna: hyper-parameter search with Optuna's ask-and-tell API.

A trial that fails, or whose value is not finite, is reported to Optuna as failed, and the search
continues. `<sweep>/optimization_results.yaml` holds the best trial.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from cosyexp.errors import UserError
from cosyexp.run.files import below, write_yaml


class OptunaSweeper(Sweeper):
    """Searches for the overrides with the best value returned by the app.

    Args:
        params: search space, Hydra's sweep syntax by key: `interval(0.1, 1)`, `range(1, 8)`,
            `choice(a, b)`, `tag(log, interval(1e-5, 1e-2))`. Sweeps on the command line are added.
        direction: "minimize" or "maximize".
        n_trials: number of trials.
        n_jobs: trials that the launcher is given at once.
        sampler: class of `optuna.samplers`, such as TPESampler.
        seed: of the sampler.
        storage: URL of a database that keeps the study, so that it can go on later; None: memory.
        study_name: of the study in the storage.
    """

    def __init__(
        self,
        *,
        params: Mapping[str, str] | None,
        direction: str,
        n_trials: int,
        n_jobs: int,
        sampler: str,
        seed: int | None,
        storage: str | None,
        study_name: str | None,
    ) -> None:
        self.params, self.direction, self.n_trials, self.n_jobs = (
            params,
            direction,
            n_trials,
            n_jobs,
        )
        self.sampler, self.seed, self.storage, self.study_name = sampler, seed, storage, study_name

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Creates the launcher of the trials."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs the trials and writes the best one.

        Raises:
            UserError: Optuna is not installed, the sampler is unknown, or every trial failed.
        """
        try:
            import optuna
        except ModuleNotFoundError:
            raise UserError(
                "hydra/sweeper=optuna needs a package that is not installed: pip install "
                "'cosyexp[optuna]'"
            ) from None
        words = [f"{key}={value}" for key, value in (self.params or {}).items()] + arguments
        assert self.launcher is not None and self.config is not None
        overrides = {
            o.get_key_element(): o for o in OverridesParser.create().parse_overrides(words)
        }
        space = {key: _distribution(o) for key, o in overrides.items() if o.is_sweep_override()}
        fixed = [str(o.input_line) for o in overrides.values() if not o.is_sweep_override()]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction=self.direction,  # type: ignore[arg-type]
            storage=self.storage,
            study_name=self.study_name,
            load_if_exists=True,
        )
        study.sampler = self._sampler(len(study.trials))
        for first in range(0, self.n_trials, self.n_jobs):
            count = min(self.n_jobs, self.n_trials - first)
            trials = [study.ask(space) for _ in range(count)]
            jobs = [[*fixed, *(f"{k}={v}" for k, v in trial.params.items())] for trial in trials]
            for trial, job in zip(trials, self.launcher.launch(jobs, first), strict=True):
                value = _value(job)
                failed = optuna.trial.TrialState.FAIL
                study.tell(trial, value, state=failed if value is None else None)
        done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        if not done:
            raise UserError("every trial of the search failed: see the errors above")
        best = {"name": "optuna", "best_params": study.best_params, "best_value": study.best_value}
        write_yaml(below(self.config.hydra.sweep.dir, "optimization_results.yaml"), best)
        found = " ".join(
            f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in study.best_params.items()
        )
        print(f"best of {len(done)} trials: {study.best_value:.6g} with {found}")

    def _sampler(self, trials: int) -> Any:
        """Returns the sampler; a study that goes on draws other numbers than it began with."""
        from optuna import samplers

        kind = getattr(samplers, self.sampler, None)
        if kind is None:
            known = ", ".join(name for name in samplers.__all__ if name.endswith("Sampler"))
            raise UserError(f"hydra.sweeper.sampler={self.sampler} is not one of {known}")
        return kind(seed=None if self.seed is None else self.seed + trials)


def _distribution(override: Override) -> Any:
    """Returns the Optuna distribution of a sweep in Hydra's syntax."""
    from optuna import distributions

    value: Any = override.value()
    if override.is_interval_sweep():
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    if override.is_range_sweep() and not value.shuffle:
        whole = all(isinstance(x, int) for x in (value.start, value.stop, value.step))
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        count = len(range(value.start, value.stop, value.step)) if whole else None
        last = value.stop if count is None else value.start + (count - 1) * value.step
        return kind(value.start, last, step=value.step)
    choices: Sequence[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
    return distributions.CategoricalDistribution(choices)


def _value(job: JobReturn) -> float | None:
    """Returns the value of a trial; None if it failed or is not finite."""
    value = job._return_value
    if job.status is not JobStatus.COMPLETED or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
