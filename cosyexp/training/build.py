"""Builds a trainer, with all its parts, from a config."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cosyexp.config import TrainConfig, engine_config, to_dict
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import VALIDATION, Draws
from cosyexp.data.loader import Loader, ValidationLoader, with_worker_errors
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.prepared import check_family
from cosyexp.data.sampler import BatchSampler
from cosyexp.errors import UserError
from cosyexp.objectives.base import Objective, ReferenceObjective
from cosyexp.registry import REFUSALS, build, trust
from cosyexp.run.adapters import adapter_note, find_base
from cosyexp.run.checkpoint import Checkpoint
from cosyexp.run.directory import RunDirectory, flat, voice_files
from cosyexp.run.environment import describe
from cosyexp.run.files import copy_file, write_json
from cosyexp.run.logs import console, log_file
from cosyexp.run.weights import init_weights, load_weights, weights_of
from cosyexp.training.engines.base import Engine
from cosyexp.training.loggers.base import Logger, RunInfo
from cosyexp.training.nodes import check_nodes, engine_node
from cosyexp.training.parameters import freeze, parameter_rules, table
from cosyexp.training.reference import setup_reference
from cosyexp.training.trainer import Trainer
from cosyexp.training.vocabulary import (
    check_base,
    check_extra,
    extended_parameters,
    initialize_extra,
)

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
        best: lowest validation loss; None if none was measured.
        step: the last step.
        stopped: whether it was requested to stop before the end.
        preempted: whether it is to be started again.
    """

    best: float | None
    step: int
    stopped: bool
    preempted: bool


class Job(NamedTuple):
    """The input of every rank: the config, and the overrides of the command line to record."""

    config: TrainConfig
    overrides: Sequence[str] = ()


def train(job: Job) -> Outcome:
    """Trains one rank of a run, which resumes from its newest checkpoint if there is one."""
    with build_trainer(job.config, job.overrides) as trainer, with_worker_errors():
        progress = trainer.fit()
        best = "" if progress.best is None else f", best validation loss {progress.best:.4f}"
        ended = "stopped" if trainer.stopped else "done"
        log.info("%s at step %d%s: %s", ended, progress.step, best, trainer.run)
        preempted = trainer.stop.preempted and trainer.stopped
        return Outcome(progress.best, progress.step, trainer.stopped, preempted)


@contextmanager
def build_trainer(config: TrainConfig, overrides: Sequence[str] = ()) -> Iterator[Trainer]:
    """Builds the trainer of a run, ready to `fit`; on exit, closes what it opened.

    A run starts from its newest checkpoint, or else from `init_from`, or else from the `pretrained`
    weights of the network, or else from scratch.

    Raises:
        UserError: a setting or a file cannot be used, or the run directory holds another run.
    """
    trust(config.trusted)
    check_nodes(config)
    run = RunDirectory(config.run_dir)
    with ExitStack() as stack:
        run.refuse_links()
        _previous_config(run, config)  # refuses another config before there are processes to wait
        engine = build_engine(config)
        stack.callback(engine.close)
        stack.enter_context(console(logging.INFO if engine.rank == 0 else logging.WARNING))
        stack.enter_context(log_file(run.file("logs", f"rank_{engine.rank}.log")))
        if engine.rank == 0:  # before the newest checkpoint is read: a running training writes more
            stack.enter_context(run.lock())
            run.remove_partial()
        engine.all_gather(None)
        # again, as another process may have trained here until the lock was free
        previous, changes = _previous_config(run, config)
        checkpoint = run.checkpoints.latest() if previous else None
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # for the next job
        _set_threads(engine_config(config.engine).threads, checkpoint)
        if config.adapter:
            if checkpoint is None:
                check_base(config)
            config.init_from = str(base_of(config, checkpoint))

        trainer = assemble(config, run, engine)
        stack.callback(trainer.loader.close)
        source = None if checkpoint else _load_initial_weights(config, trainer)
        log.info("%s", table(trainer.objective.trainables))
        trainer.setup()
        if checkpoint:
            trainer.resume(checkpoint)
            log.info("%s: resuming at step %d", run, trainer.progress.step)
            for key, (old, new) in changes.items():
                log.info("%s changes from %s to %s", key, old, new)
            moved = previous and config.init_from not in (None, previous.init_from)
            if moved and not config.adapter:
                log.warning("init_from=%s is ignored: the run has weights", config.init_from)
        else:
            log.info("%s: starting from %s", run, source or "scratch")

        if engine.rank == 0:
            _describe(run, config, overrides)
            if changes:
                run.record_changes(trainer.progress.step, changes)
        engine.all_gather(None)
        step = trainer.progress.step if checkpoint else -1
        for logger in trainer.loggers:
            logger.start(RunInfo(run, hparams(config, overrides), step, bool(changes)))
            stack.callback(logger.close)
        yield trainer


def assemble(config: TrainConfig, run: RunDirectory, engine: Engine) -> Trainer:
    """Builds the objective, the data and all other parts of a trainer, and the trainer itself.

    Raises:
        UserError: a setting or a file cannot be used.
    """
    objective = build_objective(config)
    check_extra(config, objective)
    callbacks = {name: build(node, "callback") for name, node in config.callbacks.items()}
    metrics = {name: build(node, "metric") for name, node in config.metrics.items()}
    loggers = build_loggers(config) if engine.rank == 0 else []
    train_data, valid_data = build_datasets(config, engine)  # last, because it may take hours
    if isinstance(objective, ReferenceObjective):
        setup_reference(objective, config, run, (train_data, valid_data), engine)
    return Trainer(
        objective=objective,
        engine=engine,
        loader=build_loader(config, train_data, engine),
        validation=build_validation(config, valid_data, engine) if valid_data else None,
        preview=_preview(config, valid_data) if valid_data else None,
        run=run,
        config=config.trainer,
        retention=config.checkpoint,
        seed=config.seed,
        callbacks=callbacks,
        metrics=metrics,
        loggers=loggers,
    )


# the parts ---------------------------------------------------------------------------------------


def build_engine(config: TrainConfig) -> Engine:
    """Builds the engine, which joins the process group."""
    trainer = config.trainer
    engine: Engine = build(engine_node(config), "engine")(
        precision=trainer.precision.value,
        max_grad_norm=trainer.max_grad_norm,
        ema=trainer.ema,
        running_sum=trainer.running_sum,
    )
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to run
    # Only a warning, as for the backward pass of reflection padding, which adds two numbers.
    torch.use_deterministic_algorithms(trainer.deterministic, warn_only=True)
    return engine


def build_objective(config: TrainConfig) -> Objective:
    """Builds the objective and its network, with initial weights that depend on the seed.

    With an adapter, the network has the weights of its base, `init_from`.

    Raises:
        UserError: a setting of the network, the objective or an optimizer is not valid.
    """
    torch.manual_seed(config.seed)
    network = build(config.network, "network")
    adapter = None
    if config.adapter:
        base = Path(str(config.init_from))
        load_weights(network, base)
        adapter = build(config.adapter, "adapter").attach(network, base)
    try:
        objective: Objective = build(config.objective, "objective")(network)
    except UserError:
        raise
    except REFUSALS as error:  # of a partial, which Hydra does not call
        raise UserError(f"objective cannot be built with these settings: {error}") from None
    for name, trainable in objective.trainables.items():
        try:  # checks its settings
            trainable.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except REFUSALS as error:
            keywords = getattr(trainable.optimizer, "keywords", {})
            settings = ", ".join(f"{key}={value}" for key, value in keywords.items())
            raise UserError(
                f"the optimizer of {name} cannot be built with {settings}: {error}"
            ) from None
    if adapter and len(objective.trainables) > 1:
        raise UserError(
            f"adapter= is for one network, not {' and '.join(objective.trainables)}: train an llm "
            f"or a flow, or give adapter=none"
        )
    model = list(objective.trainables.values())[-1]
    freeze(model.module, config.trainer.freeze)
    model.rules, model.adapter = parameter_rules(model.module, config.trainer), adapter
    return objective


def build_datasets(config: TrainConfig, engine: Engine) -> tuple[Dataset, Dataset | None]:
    """Opens the training and the validation data.

    Rank 0 first computes what is missing on disk.
    """
    data = config.data
    collator = build(config.model.collator, "collator")

    def open_list(lists: Any, repeats: Sequence[float] | None = None) -> Dataset:
        return Dataset(
            [lists] if isinstance(lists, str) else lists,
            collator,
            repeats=repeats,
            max_bad=data.max_bad,
            processes=data.processes,
            longest=data.longest,
            limit=data.limit,
        )

    def open_both() -> tuple[Dataset, Dataset | None]:
        return open_list(data.train, data.repeats), open_list(data.valid) if data.valid else None

    datasets = None
    if engine.rank == 0:
        if data.corpus:
            assert data.dir is not None
            prepare_corpus(data.corpus, config.family, Path(data.dir))
        if data.dir:
            check_family(Path(data.dir), config.family)
        datasets = open_both()
    engine.all_gather(None)
    return datasets or open_both()


def build_loader(config: TrainConfig, dataset: Dataset, engine: Engine) -> Loader:
    """Builds this rank's loader of training micro-batches."""
    sampler, options = _loader_options(config, dataset, engine)
    padding = 100 * sampler.padding()
    log.info("%d training utterances, %.1f %% padding", len(dataset), padding)
    return Loader(dataset, sampler, accumulate=config.trainer.accumulate, **options)


def build_validation(config: TrainConfig, dataset: Dataset, engine: Engine) -> ValidationLoader:
    """Builds this rank's loader of validation micro-batches."""
    sampler, options = _loader_options(config, dataset, engine)
    log.info("%d validation utterances", len(dataset))
    return ValidationLoader(dataset, sampler, **options)


def build_loggers(config: TrainConfig) -> list[Logger]:
    """Builds the loggers, which are not started yet."""
    return [build(node, "logger") for node in config.logger.values()]


def _loader_options(
    config: TrainConfig, dataset: Dataset, engine: Engine
) -> tuple[BatchSampler, dict[str, Any]]:
    sampler = BatchSampler(
        lengths=dataset.lengths,
        repeats=dataset.repeats,
        budget=config.data.max_frames,
        seed=config.seed,
    )
    options = {
        "seed": config.seed,
        "workers": config.data.workers,
        "pin": engine.device.type == "cuda",
        "rank": engine.rank,
        "world": engine.world,
        "equal_batches": engine.equal_batches,
    }
    return sampler, options


def _preview(config: TrainConfig, valid: Dataset) -> Any:
    """Returns a batch of utterances spread over the validation data, or None."""
    count = min(config.trainer.previews, len(valid))
    if not count:
        return None
    rows = np.unique(np.linspace(0, len(valid) - 1, count, dtype=int)).tolist()
    return valid.batch(rows, Draws(config.seed, VALIDATION))


def _previous_config(
    run: RunDirectory, config: TrainConfig
) -> tuple[TrainConfig | None, dict[str, tuple[Any, Any]]]:
    """Returns the config of the run to resume, None for a new run, and what changes in it."""
    if run.exists and run.checkpoints.all():
        return run.config(), run.refuse_other(config)
    if config.init_from:
        weights_of(config.init_from)  # reports a missing file before the data are prepared
    return None, {}


def _set_threads(wanted: int | None, checkpoint: Checkpoint | None) -> None:
    """Sets torch's threads; on CPU they are part of the arithmetic, so a resume keeps them."""
    stored = None
    if checkpoint and not torch.cuda.is_available():
        stored = checkpoint.meta.get("threads")
    if (threads := wanted or stored) and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def base_of(config: TrainConfig, checkpoint: Checkpoint | None = None) -> Path:
    """Returns the file of weights that a run adapts: that of its checkpoint, or of `init_from`.

    Raises:
        UserError: there is none, or it has changed since the checkpoint.
    """
    if checkpoint:
        path = checkpoint.path / config.weights_file
        note = adapter_note(path)
        if note is None:
            raise UserError(f"{path} is not an adapter: give another run_dir=")
        return find_base(path, note)
    if config.init_from is None:
        raise UserError("adapter= needs weights to adapt: give init_from=<a run or a weights file>")
    return weights_of(config.init_from)


def _load_initial_weights(config: TrainConfig, trainer: Trainer) -> Path | None:
    """Loads `init_from`, else the network's `pretrained`; returns where the weights are from."""
    if config.adapter:  # they were loaded before the adapter was attached
        return Path(str(config.init_from))
    trainables = trainer.objective.trainables
    networks: dict[str, Any] = {name: trainable.module for name, trainable in trainables.items()}
    network, folder = networks[trainer.model], config.network.get("pretrained")
    if config.init_from:
        extended = extended_parameters(config, network)
        path = init_weights(networks, trainer.model, config.init_from, config.init_strict, extended)
    elif folder:
        path = Path(folder)
        try:
            network.load_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"network.pretrained={folder} cannot be loaded: {reason}") from None
    else:
        return None
    initialize_extra(config, network)
    return path


def hparams(config: TrainConfig, overrides: Sequence[str]) -> dict[str, str | float | bool]:
    """Returns the settings of the command line, such as {"model": "llm", "optimizer.lr": 0.001}.

    Paths are left out.
    """
    typed = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    resolved: Mapping[str, Any] = {k: v for k, v in flat(to_dict(config)) if k in typed}
    values = {**typed, **resolved}
    return {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in values.items()
        if "/" not in str(value)
    }


def _describe(run: RunDirectory, config: TrainConfig, overrides: Sequence[str]) -> None:
    """Writes config, environment, speakers and front ends, before the first checkpoint."""
    if config.data.speakers:
        for name, source in voice_files(Path(config.data.speakers)).items():
            if not (run.path / name).exists():
                copy_file(source, run.file(name))
    run.write_config(config, overrides)
    write_json(run.file("environment.json"), describe())
