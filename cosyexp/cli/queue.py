"""The jobs of a sweep in a queue: hydra/launcher=slurm and local, through submitit.

submitit writes a job's log and its outcome below `<sweep>/.submitit/`, and requeues a job that was preempted or reached its time limit.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
    BaseSubmititLauncher,
    LocalLauncher,
    SlurmLauncher,
)

from cosyexp.cli.sweep import note, sentence, varying
from cosyexp.errors import PeerRankError, UserError


class Queue(BaseSubmititLauncher):  # type: ignore[misc]
    """As its parent, but waits for every job, also when one died without a word, and says where the logs are."""

    def __call__(self, *args: Any) -> JobReturn:
        """The job itself, on its node."""
        from cosyexp.cli.hydra_app import register

        register()
        return super().__call__(*args)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        from hydra.core.singleton import Singleton
        from submitit.core.utils import FailedJobError
        from submitit.frozen_modules import as_completed

        assert self.config is not None
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        state = Singleton.get_state()
        rows = [
            (list(words), "hydra.sweep.dir", n, str(n), state)
            for n, words in zip(numbers, job_overrides, strict=True)
        ]
        for number, words in zip(numbers, job_overrides, strict=True):
            note(self.config.hydra.sweep.dir, number, status="queued", overrides=" ".join(words))
        try:
            jobs = self._executor().map_array(self, *zip(*rows, strict=True))
        except (
            RuntimeError,
            FailedJobError,
        ) as error:  # no srun here, or sbatch refuses what is asked for
            said = str(error).strip().splitlines()[-1]
            for number in numbers:
                note(self.config.hydra.sweep.dir, number, status="refused")
            raise UserError(
                f"{self._EXECUTOR} takes no jobs ({said}): look at hydra.launcher.*, or use hydra/launcher=local"
            ) from None
        for number, varied, job in zip(numbers, varying(job_overrides), jobs, strict=True):
            print(
                f"job {number}, {varied}: {self._EXECUTOR} job {job.job_id}, whose log is {log_of(job)}",
                flush=True,
            )
        ended: dict[int, JobReturn] = {}
        try:
            for job in as_completed(jobs, poll_frequency=1):
                number = numbers[jobs.index(job)]
                ended[number] = self._outcome(job, number)
                ended[number].overrides = list(job_overrides[number - initial_job_idx])
                print(f"job {number} has {ended[number].status.name.lower()}", flush=True)
        except KeyboardInterrupt:
            left = ", ".join(job.job_id for job in jobs)
            sys.exit(
                f"cosyexp: nobody waits any longer for {self._EXECUTOR} jobs {left}; those in a queue go on"
            )
        return [ended[number] for number in numbers]

    def _executor(self) -> Any:
        import submitit

        cluster, common = self._EXECUTOR, set(BaseQueueConf.__dataclass_fields__)
        params = dict(self.params)
        first = {
            f"{cluster}_{name}": params.pop(name) for name in ("max_num_timeout",) if name in params
        }
        executor = submitit.AutoExecutor(
            folder=params.pop("submitit_folder"), cluster=cluster, **first
        )
        ranks = (
            {"slurm_srun_args": ["--kill-on-bad-exit=1"]} if cluster == "slurm" else {}
        )  # a rank that fails ends the others
        executor.update_parameters(
            **{
                name if name in common else f"{cluster}_{name}": value
                for name, value in params.items()
            },
            **ranks,
        )
        return executor

    def _outcome(self, job: Any, number: int) -> JobReturn:
        """What a job that has ended returned, or why it did not."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        assert self.config is not None
        log = f"its log is {log_of(job)}"
        try:
            ranks = job.results()
        except UncompletedJobError:
            error = UserError(f"job {number} ended without a result ({job.state.lower()}): {log}")
        except FailedJobError as failed:
            error = UserError(
                f"job {number} failed outside of its task ({str(failed).strip().splitlines()[-1]}): {log}"
            )
        else:
            failures = [rank for rank in ranks if rank.status is JobStatus.FAILED]
            if not failures:
                return ranks[0]
            cause = min(
                (rank._return_value for rank in failures),
                key=lambda error: isinstance(error, PeerRankError),
            )
            error = (
                cause
                if isinstance(cause, UserError)
                else UserError(f"job {number} failed ({sentence(cause)}): {log}")
            )
        note(self.config.hydra.sweep.dir, number, status="failed", error=sentence(error))
        return JobReturn(status=JobStatus.FAILED, _return_value=error)


class Slurm(Queue, SlurmLauncher):  # type: ignore[misc]
    pass


class Local(Queue, LocalLauncher):  # type: ignore[misc]
    pass


def log_of(job: Any) -> str:
    return os.path.relpath(job.paths.stdout)


def register() -> None:
    """Hydra builds nothing as a launcher but what bears a name in hydra_plugins."""
    known = Plugins.instance().class_name_to_class
    known |= {"hydra_plugins.cosyexp.Slurm": Slurm, "hydra_plugins.cosyexp.Local": Local}
