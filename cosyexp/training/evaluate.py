"""Measures weights as the run that they are of would have, from its run directory alone."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from cosyexp.objectives.base import ReferenceObjective
from cosyexp.run.directory import RunDirectory
from cosyexp.run.weights import load_weights
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.reference import setup_reference
from cosyexp.training.session import datasets_of, objective_of, validation_of
from cosyexp.training.validation import eval_mode, validation_losses


@cache
def evaluator(folder: Path) -> Callable[[Path], dict[str, float]]:
    """A function from a file of weights to its validation losses, on the validation data of a run, in this process."""
    run = RunDirectory(folder)
    config = run.config()
    engine = DDP(precision=config["trainer"]["precision"])
    datasets, objective = datasets_of(config, engine), objective_of(config)
    if isinstance(objective, ReferenceObjective):
        setup_reference(objective, config, run, datasets, engine)
    model = list(objective.trainables.values())[-1].module
    for module in (model, *objective.frozen_modules):
        module.to(engine.device)
    loader = validation_of(config, datasets[1], engine)

    def losses(weights: Path) -> dict[str, float]:
        load_weights(model, weights)
        with eval_mode(objective):
            found = validation_losses(objective, engine, loader)
        assert found is not None
        return found

    return losses
