"""What must hold of the plain numbers of a config, said before anything is started."""

from collections.abc import Mapping
from typing import Any

from cosyexp.errors import UserError

AT_LEAST = {
    "trainer.steps": 0,
    "trainer.epochs": 0,
    "trainer.accumulate": 1,
    "trainer.log_every": 0,
    "trainer.valid_every": 0,
    "trainer.valid_epochs": 0,
    "trainer.previews": 0,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 0,
    "checkpoint.keep_best": 0,
    "data.max_frames": 1,
    "data.max_bad": 0.0,
    "data.workers": 0,
    "data.processes": 1,
    "engine.nproc_per_node": 1,
    "engine.threads": 1,
    "optimizer.lr": 0.0,
}
MAY_BE = {"engine.nproc_per_node": "auto"}


def check_values(config: Mapping[str, Any]) -> None:
    """UserError for a number that is none, or is too small; null stays allowed where the schema allows it."""
    if not config["run_dir"]:
        raise UserError("run_dir= is empty: name the folder of the run")
    for key, least in AT_LEAST.items():
        group, name = key.split(".")
        value = config[group].get(name)
        if value is None or value == MAY_BE.get(key):
            continue
        kinds = (int,) if isinstance(least, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
            raise UserError(
                f"{key}={value} makes no sense: give a {'whole ' * isinstance(least, int)}number of at least {least}"
            )
    if config["trainer"]["steps"] is None and config["trainer"]["epochs"] is None:
        raise UserError(
            "trainer.steps and trainer.epochs are both null, so the run would never end: give one of them"
        )
    if "steps" in config["scheduler"] and config["scheduler"]["steps"] is None:
        raise UserError(
            "scheduler.steps is null, but this schedule follows the length of the run: give trainer.steps="
        )
