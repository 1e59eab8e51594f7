"""Makes a trainer from a config and runs it: one rank of one run."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

from cosyexp.config import CheckpointConfig, TrainerConfig
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import VALIDATION, Draws
from cosyexp.data.loader import Loader, ValidationLoader
from cosyexp.data.preparation import check_family, prepare_corpus
from cosyexp.data.sampler import BatchSampler
from cosyexp.errors import UserError
from cosyexp.objectives.base import Objective, ReferenceObjective
from cosyexp.run.checkpoint import Checkpoint
from cosyexp.run.directory import RunDirectory, flat
from cosyexp.run.environment import describe
from cosyexp.run.files import replace_file, write_json
from cosyexp.run.logs import console, log_file
from cosyexp.run.targets import build
from cosyexp.run.weights import init_weights, weights_of
from cosyexp.training.engines.base import Engine
from cosyexp.training.loggers import JsonLines, TensorBoard
from cosyexp.training.reference import setup_reference
from cosyexp.training.trainer import Trainer

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """best: the lowest validation loss. step: the last one. stopped: on request, before the end; preempted: to be started again."""

    best: float | None
    step: int
    stopped: bool
    preempted: bool


def run(config: Mapping[str, Any]) -> Outcome:
    """Trains what the (resolved) config says, from where its run directory stands.

    `overrides` in it are the words of the command line, kept in the run but no part of its identity.
    """
    config, overrides = (
        {key: value for key, value in config.items() if key != "overrides"},
        config.get("overrides", []),
    )
    directory = RunDirectory(config["run_dir"])
    before = directory.config() if directory.exists and directory.checkpoints.all() else None
    if before:
        directory.refuse_other(config)
    elif config["init_from"]:
        weights_of(config["init_from"])  # before the data are prepared
    with ExitStack() as stack:
        engine = _engine(config)
        stack.callback(engine.close)
        stack.enter_context(console(logging.INFO if engine.rank == 0 else logging.WARNING))
        stack.enter_context(log_file(directory.logs / f"rank_{engine.rank}.log"))
        if (
            engine.rank == 0
        ):  # before the newest checkpoint is looked for: who trains now may write another
            stack.enter_context(directory.lock())
        engine.all_gather(None)
        checkpoint = directory.checkpoints.latest() if before else None
        _set_threads(config["engine"]["threads"], checkpoint)
        datasets = datasets_of(config, engine)
        trainer = _trainer(config, engine, directory, *datasets)
        stack.callback(trainer.loader.close)
        source = _weights_to_start_from(config, trainer) if checkpoint is None else None
        if isinstance(trainer.objective, ReferenceObjective):
            setup_reference(trainer.objective, config, directory, datasets, engine)
        engine.setup(trainer.objective.trainables, trainer.objective.frozen_modules)
        if checkpoint:
            trainer.resume(checkpoint)
            log.info("%s: resuming at step %d", directory, trainer.progress.step)
            if before and before["init_from"] != config["init_from"]:
                log.warning(
                    "init_from=%s is not read: the run goes on from its own checkpoint",
                    config["init_from"],
                )
        else:
            log.info("%s: starting from %s", directory, source or "scratch")
        if engine.rank == 0:  # from here on the run directory holds a run
            _describe(directory, config, overrides)
        engine.all_gather(None)
        if engine.rank == 0:
            step = trainer.progress.step if checkpoint else -1
            trainer.loggers = [
                JsonLines(directory.metrics, step),
                TensorBoard(directory.tensorboard, step, _settings(config, overrides)),
            ]
            for logger in trainer.loggers:
                stack.callback(logger.close)
        progress = trainer.fit()
        best = "" if progress.best is None else f", best validation loss {progress.best:.4f}"
        log.info(
            "%s at step %d%s: %s",
            "done" if trainer.done else "stopped",
            progress.step,
            best,
            directory,
        )
        return Outcome(
            progress.best,
            progress.step,
            stopped=not trainer.done,
            preempted=trainer.stop.preempted and not trainer.done,
        )


def _engine(config: Mapping[str, Any]) -> Engine:
    settings, trainer = dict(config["engine"]), config["trainer"]
    del settings["nproc_per_node"], settings["threads"]  # not the engine's, but this room's
    engine: Engine = build(settings)(
        **{key: trainer[key] for key in ("precision", "max_grad_norm", "ema", "running_sum")}
    )
    if trainer["deterministic"]:
        torch.use_deterministic_algorithms(True)
    return engine


def _set_threads(wanted: int | None, checkpoint: Checkpoint | None) -> None:
    """On a CPU the number of threads is part of the arithmetic, so a resume keeps it unless told otherwise."""
    kept = checkpoint.meta.get("threads") if checkpoint and not torch.cuda.is_available() else None
    if (threads := wanted or kept) and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def datasets_of(config: Mapping[str, Any], engine: Engine) -> tuple[Dataset, Dataset]:
    """The training and the validation data; rank 0 computes what is missing on the disk, before the others look."""
    data, family = config["data"], config["family"]
    collator = build(config["model"]["collator"])

    def load() -> tuple[Dataset, Dataset]:
        shared = {key: data[key] for key in ("max_bad", "processes", "longest", "limit")}
        train, valid = (
            [lists] if isinstance(lists, str) else lists for lists in (data["train"], data["valid"])
        )
        return Dataset(train, collator, repeats=data["repeats"], **shared), Dataset(
            valid, collator, **shared
        )

    datasets = None
    if engine.rank == 0:
        if "corpus" in data:
            prepare_corpus(data["corpus"], family, Path(data["dir"]))
        if "dir" in data:
            check_family(Path(data["dir"]), family)
        datasets = load()
    engine.all_gather(None)
    return datasets or load()


def _trainer(
    config: Mapping[str, Any],
    engine: Engine,
    directory: RunDirectory,
    train: Dataset,
    valid: Dataset,
) -> Trainer:
    seed = config["seed"]
    options = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(TrainerConfig), config["trainer"])
    )
    retention = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(CheckpointConfig), config["checkpoint"])
    )
    assert isinstance(options, TrainerConfig) and isinstance(retention, CheckpointConfig)
    sampler, shared = _shared(config, train, engine)
    shown = np.unique(
        np.linspace(0, len(valid) - 1, min(options.previews, len(valid)), dtype=int)
    ).tolist()
    log.info(
        "%d utterances to train on, %d to validate on; %.1f %% padding",
        len(train),
        len(valid),
        100 * sampler.padding(),
    )
    return Trainer(
        objective=objective_of(config),
        engine=engine,
        loader=Loader(train, sampler, accumulate=options.accumulate, **shared),
        validation=validation_of(config, valid, engine),
        preview=valid.batch(shown, Draws(seed, VALIDATION)) if shown else None,
        run=directory,
        options=options,
        retention=retention,
        seed=seed,
        fingerprint=f"{len(train)} utterances, {zlib.crc32(train.lengths.tobytes()):08x}",
    )


def validation_of(config: Mapping[str, Any], valid: Dataset, engine: Engine) -> ValidationLoader:
    sampler, shared = _shared(config, valid, engine)
    return ValidationLoader(valid, sampler, **shared)


def _shared(
    config: Mapping[str, Any], dataset: Dataset, engine: Engine
) -> tuple[BatchSampler, dict[str, Any]]:
    """What the loaders of training and validation have alike."""
    data, seed, pin = config["data"], config["seed"], engine.device.type == "cuda"
    sampler = BatchSampler(
        lengths=dataset.lengths, repeats=dataset.repeats, budget=data["max_frames"], seed=seed
    )
    ranks = {"rank": engine.rank, "world": engine.world, "equal_batches": engine.equal_batches}
    return sampler, {"seed": seed, "workers": data["workers"], "pin": pin, **ranks}


def objective_of(config: Mapping[str, Any]) -> Objective:
    torch.manual_seed(config["seed"])  # the initial weights
    network = build(config["network"])
    try:
        objective: Objective = build(config["objective"])(network)
    except ValueError as error:  # a partial, which Hydra does not call
        raise UserError(str(error)) from None
    return objective


def _weights_to_start_from(config: Mapping[str, Any], trainer: Trainer) -> Path | None:
    """Loads `init_from`, or else what the network's own `pretrained` names, and returns where it was found."""
    networks: dict[str, Any] = {
        name: trainable.module for name, trainable in trainer.objective.trainables.items()
    }
    if config["init_from"]:
        return init_weights(networks, trainer.model, config["init_from"], config["init_strict"])
    if not (folder := config["network"].get("pretrained")):
        return None
    try:
        networks[trainer.model].load_pretrained(Path(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"network.pretrained={folder} cannot be taken over: {str(error).splitlines()[0]}"
        ) from None
    return Path(folder)


def _settings(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str | float | bool]:
    """What the words of the command line set, but for paths, by which runs are told apart: {"model": "llm", "optimizer.lr": 0.001}."""
    words = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    values = {**words, **{key: value for key, value in flat(config) if key in words}}
    return {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in values.items()
        if "/" not in str(value)
    }


def _describe(directory: RunDirectory, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """What a run says of itself, before its first checkpoint."""
    speakers = config["data"]["speakers"]
    if speakers and not directory.speakers.exists():
        content = Path(speakers).read_bytes()
        with replace_file(directory.speakers) as file:
            file.write(content)
    directory.write_config(config, overrides)
    write_json(directory.path / "environment.json", describe())
    directory.checkpoints.remove_partial()
