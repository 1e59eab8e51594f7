"""Validates a file of weights as the training of its run does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from cosyexp.errors import UserError
from cosyexp.objectives.base import ReferenceObjective
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.run.networks import refuse_other_network
from cosyexp.run.weights import load_weights
from cosyexp.training.build import build_datasets, build_objective, build_validation
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.reference import setup_reference
from cosyexp.training.validation import eval_mode, validation_losses


@cache
def evaluator(folder: Path) -> Callable[[Path], dict[str, float]]:
    """Returns a function from a file of weights to its losses on a run's validation data.

    Raises:
        UserError: the run has no validation data.
    """
    run = RunDirectory(folder)
    config = run.config()
    config.data.corpus = None  # the data of a run are read, not prepared: it may be someone else's
    for checkpoint in run.checkpoints.all()[-1:]:
        refuse_other_network(config.network, checkpoint.path / config.weights_file)
    config.adapter = {}  # weights are read merged
    engine = DDP(precision=config.trainer.precision.value)
    objective = build_objective(config)
    datasets = build_datasets(config, engine)
    if datasets[1] is None:
        raise UserError(f"{run} has no validation data (data.valid=null) to measure weights on")
    if isinstance(objective, ReferenceObjective):
        setup_reference(objective, config, run, datasets, engine)
    model = list(objective.trainables.values())[-1].module
    for module in (model, *objective.frozen_modules):
        module.to(engine.device)
    loader = build_validation(config, datasets[1], engine)
    metrics = [build(node, "metric") for node in config.metrics.values()]

    def losses(weights: Path) -> dict[str, float]:
        load_weights(model, weights)
        with eval_mode(objective):
            found = validation_losses(objective, engine, loader, metrics=metrics)
        assert found is not None
        return found

    return losses
