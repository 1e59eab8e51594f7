"""The training loop: the only one of the repository. It knows neither tasks nor engines.

What happens at a step, in this order: log if due, validate if due, save if due; then the next step. A run that was killed, or
stopped during any of these, does what is missing when it comes back, and goes on to the same weights.

    while not done:
        log -> validate -> save
        step:  units -> for each trainable: every micro-batch's turn -> engine.step
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from cosyexp.config import CheckpointConfig, TrainerConfig
from cosyexp.data.batch import Batch
from cosyexp.data.loader import Loader, LoaderState, MicroBatch, ValidationLoader
from cosyexp.objectives.base import Loss, Objective
from cosyexp.run.checkpoint import Checkpoint
from cosyexp.run.directory import RunDirectory
from cosyexp.training import saving
from cosyexp.training.engines.base import Engine, StepReport
from cosyexp.training.loggers import Logger
from cosyexp.training.metrics import TrainableMetrics, means, merged
from cosyexp.training.nonfinite import NonFiniteGuard
from cosyexp.training.seeding import seed_forward
from cosyexp.training.signals import StopRequest
from cosyexp.training.validation import eval_mode, validation_losses

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is. step: updates of the model. samples: utterances seen. updates: of each trainable.

    validated: the step of the newest validation, whose losses `losses` holds. best: the lowest validation loss so far.
    seconds: spent in steps.
    """

    step: int = 0
    samples: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    validated: int = -1
    losses: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    seconds: float = 0.0


class Trainer:
    """Takes a run from where it stands to its last step.

    preview: a batch of validation utterances to look at after each validation, or None. fingerprint: of the training data;
    a resume on other data is refused.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        engine: Engine,
        loader: Loader,
        validation: ValidationLoader,
        preview: Batch | None,
        run: RunDirectory,
        options: TrainerConfig,
        retention: CheckpointConfig,
        seed: int,
        fingerprint: str,
    ) -> None:
        self.objective, self.engine, self.loader, self.validation = (
            objective,
            engine,
            loader,
            validation,
        )
        self.preview, self.run, self.options, self.retention = preview, run, options, retention
        self.seed, self.fingerprint = seed, fingerprint
        self.loggers: Sequence[Logger] = ()
        self.stop = StopRequest()
        self.progress = Progress(updates=dict.fromkeys(objective.trainables, 0))
        self.model = list(objective.trainables)[-1]
        self.saved = -1
        self.nonfinite_guard = NonFiniteGuard(
            run.logs, engine.rank, options.precision, options.on_nonfinite
        )
        self._forget()

    # the loop -------------------------------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Trains until done, or until asked to stop."""
        with (
            self.stop,
            tqdm(
                total=self.options.steps,
                initial=self.progress.step,
                unit="step",
                disable=self._quiet(),
            ) as bar,
        ):
            while True:
                stopping = self._stop_requested()
                if self._due(self.options.log_every):
                    bar.set_postfix(self._log())
                if self._validation_due() and not stopping:
                    stopping = not self.validate()
                if self._save_due(stopping):
                    self.save("stop" if stopping else "last" if self.done else "step")
                if self.done or stopping:
                    return self.progress
                self.step(self.loader.next_step())
                bar.update(self.progress.step - bar.n)

    def step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """One update of every trainable. A rank without micro-batches, or with idle ones, takes part all the same."""
        began, progress = time.perf_counter(), self.progress
        batches = [micro.batch.to(self.engine.device) for micro in micro_batches]
        counted = [
            batch for micro, batch in zip(micro_batches, batches, strict=True) if not micro.idle
        ]
        totals = self._totals(counted)
        iterators = [self.objective.losses(batch) for batch in batches]
        for turn, name in enumerate(self.objective.trainables):
            losses = []
            for micro, iterator in zip(micro_batches, iterators, strict=True):
                seed_forward(self.seed, progress.step, micro.number, turn)
                with self.engine.autocast():
                    loss = next(iterator)
                self.engine.backward(
                    name, loss.scaled(totals) * (not micro.idle), last=micro is micro_batches[-1]
                )
                losses += [] if micro.idle else [loss.detach()]
            report = self.engine.step(name, progress.updates[name])
            self._record(name, counted, losses, totals, report)
        assert all(next(iterator, None) is None for iterator in iterators), (
            "an objective yields once for each trainable"
        )
        progress.samples += int(totals["utterances"])
        progress.seconds += time.perf_counter() - began

    def validate(self) -> bool:
        """Measures the loss on the validation data; False where a request to stop came in between."""
        with eval_mode(self.objective):
            losses = validation_losses(
                self.objective, self.engine, self.validation, self._stop_requested
            )
            if losses is None:
                return False
            self._show()
        progress = self.progress
        progress.validated, progress.losses, self.saved = (
            progress.step,
            losses,
            -1,
        )  # a checkpoint without them is to be renewed
        progress.best = (
            losses["loss"] if progress.best is None else min(progress.best, losses["loss"])
        )
        self._write({f"valid/{name}": value for name, value in losses.items()})
        log.info("step %d: validation loss %.4f", progress.step, losses["loss"])
        return True

    @property
    def done(self) -> bool:
        steps, epochs = self.options.steps, self.options.epochs
        return (steps is not None and self.progress.step >= steps) or (
            epochs is not None and self.loader.state.epoch >= epochs
        )

    # checkpoints ----------------------------------------------------------------------------------------------------

    def save(self, tag: str) -> None:
        """Writes a checkpoint, and lets go of the ones that need not stay."""
        self.nonfinite_guard.check(self.progress.step)
        progress = self.progress
        state = {
            "progress": asdict(progress),
            "loader": asdict(self.loader.state),
            "metrics": self._gathered(),
            "fingerprint": self.fingerprint,
        }
        meta = {
            "step": progress.step,
            "epoch": self.loader.state.epoch,
            "samples": progress.samples,
            "loss_dict": progress.losses if progress.validated == progress.step else {},
            "tag": tag,
            "threads": torch.get_num_threads(),
        }
        saving.save(self.run.checkpoints, self.engine, self.objective.trainables, state, meta)
        if self.engine.rank == 0:
            self.run.checkpoints.prune(self.retention.keep_last, self.retention.keep_best)
        self.saved = progress.step

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        state = saving.restore(checkpoint, self.engine, self.objective.trainables)
        saving.refuse_other_data(self.run, self.fingerprint, state["fingerprint"])
        self.progress = Progress(**state["progress"])
        loader_state = LoaderState(**state["loader"])
        self.loader.seek(loader_state)
        if loader_state.batch and loader_state.block != self.loader.block:
            log.info(
                "the epoch at hand goes on in steps of %d micro-batches, the next in steps of %d",
                loader_state.block,
                self.loader.block,
            )
        self._forget()
        for name, metrics in self.metrics.items():
            own = state["metrics"][name]
            metrics.load(
                own if self.engine.rank == 0 else {**own, "loss": {}}
            )  # rank 0 goes on with the sums of all
        self.saved = self.progress.step

    # details --------------------------------------------------------------------------------------------------------

    def _totals(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The units of the whole step, over micro-batches and ranks, and its utterances."""
        weights = [self.objective.count_units(batch) for batch in batches]
        own = [float(sum(w[unit] for w in weights)) for unit in self.objective.units]
        sums = self.engine.all_reduce([*own, float(sum(len(batch) for batch in batches))])
        return dict(zip([*self.objective.units, "utterances"], sums, strict=True))

    def _record(
        self,
        name: str,
        batches: Sequence[Batch],
        losses: Sequence[Loss],
        totals: Mapping[str, float],
        report: StepReport,
    ) -> None:
        """Notes an update of a trainable. Where an update may be skipped, the host waits to know whether it was."""
        progress, utts = self.progress, tuple(utt for batch in batches for utt in batch.utts)
        self.nonfinite_guard.add(progress.step, name, utts, losses, report)
        if self.nonfinite_guard.may_skip and not self.nonfinite_guard.check(progress.step + 1):
            return
        self.metrics[name].add(losses, totals, report)
        progress.updates[name] += 1
        progress.step += name == self.model

    def _log(self) -> dict[str, float]:
        """Writes the means since the last log; returns what the progress bar shows."""
        self.nonfinite_guard.check(self.progress.step)
        if not self.metrics[self.model].updates:
            return {}
        values: dict[str, float] = {}
        for name, state in self._gathered().items():
            losses = means([state["loss"]], state["units"])
            prefix = "train/" if name == self.model else f"train/{name}_"
            values[f"{prefix}loss"] = losses.pop("loss")
            values[f"{prefix}lr"] = self.engine.learning_rate(name)
            values[f"{prefix}grad_norm"] = state["norm"] / state["updates"]
            values |= {f"train/{key}": value for key, value in losses.items()}
        seconds, samples = (
            self.progress.seconds - self._since.seconds,
            self.progress.samples - self._since.samples,
        )
        values["time/samples_per_second"] = samples / max(seconds, 1e-9)
        self._write(values)
        told = (
            logging.DEBUG if sys.stderr.isatty() else logging.INFO
        )  # on a terminal the bar says it
        speed = values["time/samples_per_second"]
        log.log(
            told,
            "step %d: training loss %.4f, %.1f utterances/s",
            self.progress.step,
            values["train/loss"],
            speed,
        )
        self._forget()
        return {"loss": values["train/loss"]}

    def _forget(self) -> None:
        """Starts the means anew."""
        self.metrics = {name: TrainableMetrics() for name in self.objective.trainables}
        self._since = replace(self.progress)

    def _gathered(self) -> dict[str, dict[str, Any]]:
        """What each trainable measured since the last log, over all ranks."""
        ranks = self.engine.all_gather(
            {name: metrics.state_dict() for name, metrics in self.metrics.items()}
        )
        return {
            name: merged([states[name] for states in ranks]) for name in self.objective.trainables
        }

    def _write(self, values: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.scalars(self.progress.step, self.loader.state.epoch, values)

    def _show(self) -> None:
        """Gives the loggers something to look at and to listen to."""
        if self.preview is None:
            return
        with self.engine.autocast():
            for name, thing in self.objective.preview(self.preview.to(self.engine.device)):
                for logger in self.loggers:
                    logger.media(self.progress.step, name, thing)

    def _due(self, every: int) -> bool:
        return self.done or (every > 0 and self.progress.step % every == 0)

    def _epoch_due(self) -> bool:
        every = self.options.valid_epochs
        return every > 0 and self.loader.epoch_ends and self.loader.state.epoch % every == 0

    def _validation_due(self) -> bool:
        return self.progress.validated != self.progress.step and (
            self._due(self.options.valid_every) or self._epoch_due()
        )

    def _save_due(self, stopping: bool) -> bool:
        due = stopping or self._due(self.retention.every) or self._epoch_due()
        return due and self.saved != self.progress.step

    def _stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks agree."""
        return self.stop.agreed(self.engine.all_reduce)

    def _quiet(self) -> bool | None:
        """No progress bar on other ranks, nor (None) where nobody looks."""
        return True if self.engine.rank > 0 else None
