"""The training loop, which is independent of the task and of the engine.

One step of the loop, and the events that callbacks see:

    on_fit_start
    while True:
        log          if due                      loggers
        validate     if due                      measure, on_validation_end
        save         if due                      on_save
        stop         if done, or asked to
        step         count units -> for each trainable: every micro-batch's loss and backward,
                     then one update             on_step_end
    on_fit_end

A run that was killed or stopped at any of these points does what is missing when it is resumed,
and ends with the same weights.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from tqdm import tqdm

from cosyexp.config import CheckpointConfig, OnError, TrainerConfig
from cosyexp.data.batch import Batch
from cosyexp.data.loader import Loader, LoaderState, MicroBatch, ValidationLoader
from cosyexp.objectives.base import Loss, Metric, Objective
from cosyexp.run.checkpoint import BY_LOSS, Checkpoint, KeepBest
from cosyexp.run.directory import RunDirectory
from cosyexp.training import saving
from cosyexp.training.callbacks.base import Callback, StepStats, refuse_unmeasured
from cosyexp.training.engines.base import Engine, StepReport
from cosyexp.training.loggers.base import Logger
from cosyexp.training.meters import Meter, merged, training_metrics
from cosyexp.training.nonfinite import NonFiniteGuard
from cosyexp.training.progress import Progress
from cosyexp.training.seeding import seed_forward
from cosyexp.training.signals import StopRequest
from cosyexp.training.validation import eval_mode, log_preview, validation_losses

log = logging.getLogger(__name__)


class Trainer:
    """Trains from the current step to the last one.

    Args:
        objective: the task: its networks, losses and validation.
        engine: where and how a step is computed.
        loader: this rank's micro-batches of each step.
        validation: this rank's micro-batches of the validation data; None: no validation.
        preview: validation utterances shown in the loggers after each validation, or None.
        run: the run directory.
        config: of the loop.
        retention: of the checkpoints.
        seed: of all random draws.
        callbacks, metrics: by name.
        loggers: empty on ranks other than 0.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        engine: Engine,
        loader: Loader,
        validation: ValidationLoader | None,
        preview: Batch | None,
        run: RunDirectory,
        config: TrainerConfig,
        retention: CheckpointConfig,
        seed: int,
        callbacks: Mapping[str, Callback],
        metrics: Mapping[str, Metric],
        loggers: Sequence[Logger],
    ) -> None:
        self.objective, self.engine, self.loader = objective, engine, loader
        self.validation, self.preview, self.run = validation, preview, run
        self.config, self.retention, self.seed = config, retention, seed
        self.callbacks, self.metrics, self.loggers = callbacks, metrics, loggers
        self.keep_best = [KeepBest(BY_LOSS, retention.keep_best)]
        self.model = list(objective.trainables)[-1]
        self.progress = Progress(updates=dict.fromkeys(objective.trainables, 0))
        self.stop = StopRequest()
        self.nonfinite_guard = NonFiniteGuard(
            run.logs, engine.rank, config.precision, config.on_nonfinite
        )
        self.saved = -1  # the step of the newest checkpoint that needs no renewal
        self.stopped = False  # whether `fit` ended because it was requested to
        self._ended_by_callback = False
        self._reset_metrics()

    def setup(self) -> None:
        """Moves the networks to the device and makes the optimizers; called once, at first.

        Raises:
            UserError: a callback monitors a value that the validation does not measure.
        """
        self.engine.setup(self.objective.trainables, self.objective.frozen_modules)
        refuse_unmeasured(self)

    # the loop ------------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Trains to the last step, or until a stop is requested."""
        total, start = self.config.steps, self.progress.step
        hidden = self.engine.rank > 0 or None  # None: tqdm decides by the terminal
        with self.stop, tqdm(total=total, initial=start, unit="step", disable=hidden) as bar:
            self._call("on_fit_start")
            while True:
                stopping = self._stop_requested()
                if self._due(self.config.log_every):
                    bar.set_postfix(self._log_training())
                if self._validation_due() and not stopping:
                    stopping = not self.validate() or self._stop_requested()
                if self._save_due(stopping):
                    self.save("stop" if stopping else "last" if self.done else "step")
                if self.done or stopping:
                    self.stopped = stopping
                    break
                began = time.perf_counter()
                micro_batches = self.loader.next_step()
                waited = time.perf_counter() - began
                units = self.step(micro_batches)
                self._call("on_step_end", StepStats(units, waited))
                bar.update(self.progress.step - bar.n)
            self._call("on_fit_end")
        return self.progress

    def step(self, micro_batches: Sequence[MicroBatch]) -> Mapping[str, float]:
        """Updates every trainable once, and returns the units of the step, over all ranks.

        A rank without micro-batches, or with idle ones, still takes part.
        """
        began, progress = time.perf_counter(), self.progress
        # counted on the host, which must not wait for the device
        counted = [micro.batch for micro in micro_batches if not micro.idle]
        totals = self._totals(counted)
        batches = [micro.batch.to(self.engine.device) for micro in micro_batches]
        iterators = [self.objective.losses(batch) for batch in batches]
        for turn, name in enumerate(self.objective.trainables):
            losses = []
            for micro, iterator in zip(micro_batches, iterators, strict=True):
                seed_forward(self.seed, progress.step, micro.number, turn)
                with self.engine.autocast():
                    loss = next(iterator)
                share = loss.scaled(totals) * (not micro.idle)
                self.engine.backward(name, share, last=micro is micro_batches[-1])
                losses += [] if micro.idle else [loss.detach()]
            report = self.engine.step(name, progress.updates[name])
            self._record(name, counted, losses, totals, report)
        assert all(next(iterator, None) is None for iterator in iterators), (
            "an objective yields one loss for each of its trainables"
        )
        progress.samples += int(totals["utterances"])
        progress.seconds += time.perf_counter() - began
        return totals

    def validate(self) -> bool:
        """Measures losses and metrics on the validation data; False if asked to stop meanwhile."""
        assert self.validation is not None
        with eval_mode(self.objective):
            losses = validation_losses(
                self.objective,
                self.engine,
                self.validation,
                metrics=self.metrics.values(),
                stopped=self._stop_requested,
            )
            if losses is None:
                return False
            progress = self.progress
            log_preview(self.objective, self.engine, self.preview, self.loggers, progress.step)
        for callback in self.callbacks.values():
            losses |= callback.measure(self)
        progress.add_validation(losses, self.validation.dataset.fingerprint)
        self.saved = -1  # a checkpoint without these losses is renewed
        self.log({f"valid/{name}": value for name, value in losses.items()})
        log.info("step %d: validation loss %.4f", progress.step, losses["loss"])
        self._call("on_validation_end", losses)
        return True

    @property
    def done(self) -> bool:
        """Whether this is the last step."""
        steps, epochs = self.config.steps, self.config.epochs
        all_steps = steps is not None and self.progress.step >= steps
        all_epochs = epochs is not None and self.loader.state.epoch >= epochs
        return all_steps or all_epochs or self._ended_by_callback

    def log(self, values: Mapping[str, float]) -> None:
        """Sends values to the loggers, at the current step; a name has one value per step."""
        for logger in self.loggers:
            logger.log_metrics(self.progress.step, self.loader.state.epoch, values)

    # checkpoints ---------------------------------------------------------------------------------

    def save(self, tag: str) -> None:
        """Writes a checkpoint and prunes older ones.

        Args:
            tag: why it is written: "step", "stop" or "last".

        Raises:
            OSError: it cannot be written, and is the last, or `on_error` does not let it go.
        """
        self.nonfinite_guard.check(self.progress.step)
        for logger in self.loggers:
            logger.flush()
        progress = self.progress
        state = {
            "progress": asdict(progress),
            "loader": asdict(self.loader.state),
            "metrics": self._gather_metrics(),
            "fingerprint": self.loader.dataset.fingerprint,
            "callbacks": {name: c.state_dict() for name, c in self.callbacks.items()},
        }
        meta = {
            "step": progress.step,
            "epoch": self.loader.state.epoch,
            "samples": progress.samples,
            **progress.validation_meta(),
            "tag": tag,
            "threads": torch.get_num_threads(),
        }
        trainables, checkpoints = self.objective.trainables, self.run.checkpoints
        try:
            path = saving.save(checkpoints, self.engine, trainables, state, meta)
        except OSError as error:
            if tag != "step" or self.retention.on_error is OnError.stop:
                raise
            log.warning("step %d: no checkpoint, training goes on (%s)", progress.step, error)
            return
        self._call("on_save", path)
        if self.engine.rank == 0:
            self.run.checkpoints.prune(self.retention.keep_last, self.keep_best)
        self.saved = progress.step

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restores a checkpoint; on other validation data, the best loss starts anew.

        Raises:
            UserError: the training data or the layout of the optimizer state differs.
        """
        state = saving.restore(checkpoint, self.engine, self.objective.trainables)
        saving.refuse_other_data(self.run, self.loader.dataset.fingerprint, state["fingerprint"])
        self.progress = Progress(**state["progress"])
        valid = self.validation
        revalidates = valid and self.progress.use_validation(valid.dataset.fingerprint)
        self.loader.seek(LoaderState(**state["loader"]))
        self._reset_metrics()
        for name, sums in self.sums.items():
            own = state["metrics"][name]
            # rank 0 goes on with the sums of all ranks
            sums.load(own if self.engine.rank == 0 else {**own, "loss": {}})
        for name, callback in self.callbacks.items():
            if name in state["callbacks"] and not (callback.monitors and revalidates):
                callback.load_state_dict(state["callbacks"][name])
        self.saved = self.progress.step

    # details -------------------------------------------------------------------------------------

    def _call(self, event: str, *args: Any) -> None:
        for callback in self.callbacks.values():
            getattr(callback, event)(self, *args)

    def _stop_requested(self) -> bool:
        """Returns whether a stop was requested on any rank; also agrees on an end by a callback."""
        ended = any(callback.should_stop for callback in self.callbacks.values())
        stopping, self._ended_by_callback = self.stop.agreed(self.engine.all_reduce, ended)
        return stopping

    def _totals(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Returns the units of the step, over micro-batches and ranks, and its utterances."""
        counts = [self.objective.count_units(batch) for batch in batches]
        own = [float(sum(count[unit] for count in counts)) for unit in self.objective.units]
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
        """Records an update; if updates may be skipped, the host waits for the outcome."""
        progress, utts = self.progress, tuple(utt for batch in batches for utt in batch.utts)
        guard = self.nonfinite_guard
        guard.add(progress.step, name, utts, losses, report)
        # otherwise the updates of the step before are checked, so that the host does not wait
        if not guard.check(progress.step + guard.may_skip):
            return
        self.sums[name].add(losses, totals, report)
        progress.updates[name] += 1
        progress.step += name == self.model

    def _log_training(self) -> dict[str, float]:
        """Logs the means since the last log; returns what the progress bar shows."""
        self.nonfinite_guard.check(self.progress.step)
        if not self.sums[self.model].updates:
            return {}
        rates = {name: self.engine.learning_rate(name) for name in self.sums}
        values = training_metrics(self._gather_metrics(), rates, self.model)
        seconds = self.progress.seconds - self._since.seconds
        samples = self.progress.samples - self._since.samples
        values["time/samples_per_second"] = speed = samples / max(seconds, 1e-9)
        self.log(values)
        level = logging.DEBUG if sys.stderr.isatty() else logging.INFO  # a terminal has the bar
        message = "step %d: training loss %.4f, %.1f utterances/s"
        log.log(level, message, self.progress.step, values["train/loss"], speed)
        self._reset_metrics()
        return {"loss": values["train/loss"]}

    def _reset_metrics(self) -> None:
        self.sums = {name: Meter() for name in self.objective.trainables}
        self._since = replace(self.progress)

    def _gather_metrics(self) -> dict[str, dict[str, Any]]:
        """Returns what each trainable measured since the last log, over all ranks."""
        own = {name: sums.state_dict() for name, sums in self.sums.items()}
        ranks = self.engine.all_gather(own)
        return {name: merged([states[name] for states in ranks]) for name in own}

    def _due(self, every: int) -> bool:
        return self.done or (every > 0 and self.progress.step % every == 0)

    def _epoch_due(self) -> bool:
        every = self.config.valid_epochs
        return every > 0 and self.loader.epoch_ends and self.loader.state.epoch % every == 0

    def _validation_due(self) -> bool:
        if self.validation is None or self.progress.validated == self.progress.step:
            return False
        return self._due(self.config.valid_every) or self._epoch_due()

    def _save_due(self, stopping: bool) -> bool:
        due = stopping or self._due(self.retention.every) or self._epoch_due()
        return due and self.saved != self.progress.step
