"""Computes validation losses, during a training or of any weights of a run's network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from cosyexp.data.batch import Batch
from cosyexp.data.loader import ValidationLoader
from cosyexp.objectives.base import Metric, Objective
from cosyexp.training.engines.base import Engine
from cosyexp.training.loggers.base import Logger
from cosyexp.training.meters import means, to_host


@contextmanager
def eval_mode(objective: Objective) -> Iterator[None]:
    """Switches all trainables to evaluation mode, without gradients, within the block."""
    modules = [trainable.module for trainable in objective.trainables.values()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.train()


def log_preview(
    objective: Objective,
    engine: Engine,
    preview: Batch | None,
    loggers: Sequence[Logger],
    step: int,
) -> None:
    """Shows some utterances, if there are any, in the loggers; called within `eval_mode`."""
    if preview is None:
        return
    with engine.autocast():
        for name, media in objective.preview(preview.to(engine.device)):
            for logger in loggers:
                logger.log_media(step, name, media)


def measured_names(
    objective: Objective, engine: Engine, loader: ValidationLoader, metrics: Iterable[Metric] = ()
) -> list[str]:
    """Returns the names of what a validation measures, on all ranks, by trying one micro-batch.

    Args:
        objective, engine, loader, metrics: as in `validation_losses`.
    """
    names: list[str] = []
    if micro := loader.first():
        batch = micro.batch.to(engine.device)
        with eval_mode(objective), engine.autocast():
            names += objective.validate(batch)
            for metric in metrics:
                names += metric(objective, batch)
    return list(
        dict.fromkeys(["loss", *(name for rank in engine.all_gather(names) for name in rank)])
    )


def validation_losses(
    objective: Objective,
    engine: Engine,
    loader: ValidationLoader,
    *,
    metrics: Iterable[Metric] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Computes the mean validation losses; call it within `eval_mode`, on all ranks.

    For the same weights the result is the same to the last bit, on any number of ranks: the losses
    of all micro-batches are gathered and added in a fixed order.

    Args:
        objective: the objective.
        engine: the engine, for its device, precision and communication.
        loader: the micro-batches of this rank.
        metrics: measured too; their names must differ from those of the losses.
        stopped: called on all ranks before each micro-batch; returns whether to stop.

    Returns:
        The losses by name, on all ranks, or None if `stopped` returned True.
    """
    parts, batches = [], iter(loader)
    for _ in range(loader.rounds):
        if stopped():
            return None
        if micro := next(batches, None):
            batch = micro.batch.to(engine.device)
            with engine.autocast():
                loss = objective.validate(batch)
                for metric in metrics:
                    loss.update(metric(objective, batch))
            if not micro.idle:
                counts = objective.count_units(micro.batch)
                parts.append((micro.number, to_host(loss.detach()), counts))
    gathered = sorted(part for rank in engine.all_gather(parts) for part in rank)
    units = {unit: sum(weights[unit] for *_, weights in gathered) for unit in objective.units}
    return means([sums for _, sums, _ in gathered], units)
