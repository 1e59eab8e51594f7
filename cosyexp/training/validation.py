"""The losses of a network on validation data: of a training, or of any weights that fit into a run's network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cosyexp.data.loader import ValidationLoader
from cosyexp.objectives.base import Objective
from cosyexp.training.engines.base import Engine
from cosyexp.training.metrics import means, to_host


@contextmanager
def eval_mode(objective: Objective) -> Iterator[None]:
    """Within it there is no dropout, and no gradient."""
    modules = [trainable.module for trainable in objective.trainables.values()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.train()


def validation_losses(
    objective: Objective,
    engine: Engine,
    loader: ValidationLoader,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The same for the same weights to the last bit, on any number of ranks; None where a request to stop came in between.

    To be called within `eval_mode`.
    """
    parts, batches = [], iter(loader)
    for _ in range(loader.rounds):
        if stopped():
            return None
        if micro := next(batches, None):
            batch = micro.batch.to(engine.device)
            with engine.autocast():
                loss = objective.validate(batch)
            if not micro.idle:
                parts.append((micro.number, to_host(loss.detach()), objective.count_units(batch)))
    gathered = sorted(part for rank in engine.all_gather(parts) for part in rank)
    units = {unit: sum(weights[unit] for *_, weights in gathered) for unit in objective.units}
    return means([sums for _, sums, _ in gathered], units)
