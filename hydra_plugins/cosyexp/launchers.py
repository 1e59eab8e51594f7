"""The launchers hydra/launcher=slurm and hydra/launcher=local, which run the jobs with submitit.

They differ from the launchers of the submitit plugin in two ways: they wait for every job, and a
job that died without a result becomes a failed row of the table. submitit writes the log and the
result of a job below `<sweep>/.submitit/`, and requeues a job that was preempted or reached its
time limit.

Hydra imports this module in every app. Without submitit's plugin the classes are
abstract, so Hydra skips them, and composing one of their configs names the missing package.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from cosyexp.errors import PeerRankError, UserError

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
        BaseSubmititLauncher,
        LocalLauncher,
        SlurmLauncher,
    )
except ModuleNotFoundError:
    BaseSubmititLauncher = LocalLauncher = SlurmLauncher = Launcher


class QueueLauncher(BaseSubmititLauncher):  # type: ignore[misc]
    """Base class of the launchers: waits for every job, and prints where the logs are."""

    def __call__(self, *args: Any) -> JobReturn:
        """Runs one job; called on the node of the job."""
        from cosyexp.cli.hydra_app import register

        register()
        return super().__call__(*args)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submits a batch of jobs and returns their results, failed ones included.

        Raises:
            UserError: the queue refuses the jobs.
        """
        from hydra.core.singleton import Singleton
        from submitit.core.utils import FailedJobError
        from submitit.helpers import as_completed

        from cosyexp.cli.sweep import record_job, varying_overrides

        assert self.config is not None
        sweep_dir, queue = self.config.hydra.sweep.dir, self._EXECUTOR
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        state = Singleton.get_state()
        calls = [
            (list(words), "hydra.sweep.dir", number, str(number), state)
            for number, words in zip(numbers, job_overrides, strict=True)
        ]
        for number, words in zip(numbers, job_overrides, strict=True):
            record_job(sweep_dir, number, status="queued", overrides=" ".join(words))
        try:
            jobs = self._executor().map_array(self, *zip(*calls, strict=True))
        except (RuntimeError, FailedJobError) as error:  # no srun, or sbatch refuses a setting
            for number in numbers:
                record_job(sweep_dir, number, status="refused")
            raise UserError(
                f"{queue} takes no jobs ({str(error).strip().splitlines()[-1]}): check "
                f"hydra.launcher.*, or use hydra/launcher=local"
            ) from None
        varied = varying_overrides(job_overrides)
        for number, words, job in zip(numbers, varied, jobs, strict=True):
            print(f"job {number}, {words}: {queue} job {job.job_id}, log {_log(job)}", flush=True)
        returned: dict[int, JobReturn] = {}
        try:
            for job in as_completed(jobs, poll_frequency=1):
                number = numbers[jobs.index(job)]
                returned[number] = self._result(job, number)
                returned[number].overrides = list(job_overrides[number - initial_job_idx])
                print(f"job {number} {returned[number].status.name.lower()}", flush=True)
        except KeyboardInterrupt:
            ids = ", ".join(job.job_id for job in jobs)
            sys.exit(f"cosyexp: stopped waiting for {queue} jobs {ids}; those in a queue go on")
        return [returned[number] for number in numbers]

    def _executor(self) -> Any:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        cluster, common = self._EXECUTOR, set(BaseQueueConf.__dataclass_fields__)
        params = dict(self.params)
        folder = params.pop("submitit_folder")
        own = {f"{cluster}_{k}": params.pop(k) for k in ("max_num_timeout",) if k in params}
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **own)
        # srun ends all ranks of a job when one of them fails
        ranks = {"slurm_srun_args": ["--kill-on-bad-exit=1"]} if cluster == "slurm" else {}
        named = {k if k in common else f"{cluster}_{k}": value for k, value in params.items()}
        executor.update_parameters(**named, **ranks)
        return executor

    def _result(self, job: Any, number: int) -> JobReturn:
        """Returns the result of a job that has ended, or the reason why there is none."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        from cosyexp.cli.sweep import one_line, record_job

        assert self.config is not None
        log = f"see its log {_log(job)}"
        try:
            ranks = job.results()
        except UncompletedJobError:
            error = UserError(f"job {number} ended without a result ({job.state.lower()}): {log}")
        except FailedJobError as failed:
            reason = str(failed).strip().splitlines()[-1]
            error = UserError(f"job {number} failed outside of its task ({reason}): {log}")
        else:
            failures = [rank for rank in ranks if rank.status is JobStatus.FAILED]
            if not failures:
                return ranks[0]
            errors = (rank._return_value for rank in failures)
            cause = min(errors, key=lambda error: isinstance(error, PeerRankError))
            error = cause
            if not isinstance(cause, UserError):
                error = UserError(f"job {number} failed ({one_line(cause)}): {log}")
        record_job(self.config.hydra.sweep.dir, number, status="failed", error=one_line(error))
        return JobReturn(status=JobStatus.FAILED, _return_value=error)


class Slurm(QueueLauncher, SlurmLauncher):  # type: ignore[misc]
    """Runs each job of a sweep as a SLURM job."""


class Local(QueueLauncher, LocalLauncher):  # type: ignore[misc]
    """Runs each job of a sweep as a process on this machine."""


def _log(job: Any) -> str:
    return os.path.relpath(job.paths.stdout)
