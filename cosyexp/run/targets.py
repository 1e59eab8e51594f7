"""What a config may build. A run directory can come from anywhere, so its `_target_`s are looked at before anything is called."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import hydra.utils
from hydra.errors import HydraException

from cosyexp.errors import UserError

PACKAGES = ("data", "models", "objectives", "training", "exporting")
TRUSTED = (*(f"cosyexp.{package}." for package in PACKAGES), "torch.optim.", "torch.nn.")


FUNCTIONS = (
    "cosyexp.training.schedules",
    "cosyexp.models.llm.sampling",
)  # of ours, those that only compute


def check_targets(config: Any, trusted: Sequence[str] = ()) -> None:
    """UserError where a `_target_` is not a class or function that one of the trusted packages itself defines.

    trusted: more packages, from the command line alone, never from a run.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            _check(str(config["_target_"]), (*TRUSTED, *(f"{package}." for package in trusted)))
        for value in config.values():
            check_targets(value, trusted)
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for value in config:
            check_targets(value, trusted)
    elif (
        isinstance(config, str) and "${" in config
    ):  # a run's config is resolved; what is not could bring in anything
        raise UserError(
            f"the config holds {config!r}, an interpolation, where a _target_ is built: write out its value"
        )


def _check(target: str, trusted: tuple[str, ...]) -> None:
    allowed = ", ".join(f"{package}*" for package in trusted)
    if not target.startswith(trusted):
        raise UserError(f"the config names _target_ {target}, but only {allowed} may be built")
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, ValueError, HydraException):
        raise UserError(
            f"the config names _target_ {target}, which does not exist: correct its name"
        ) from None
    # cosyexp.data.preparation.suppress starts well, but is another package's; torch.nn.Module.__init__ is no thing of its own
    whole = (
        inspect.isclass(found) or inspect.isfunction(found)
    ) and found.__qualname__ == found.__name__
    if not whole or not f"{found.__module__}.".startswith(trusted):
        raise UserError(f"the config names _target_ {target}, which is not defined in {allowed}")
    if (
        inspect.isfunction(found)
        and target.startswith("cosyexp.")
        and found.__module__ not in FUNCTIONS
    ):
        raise UserError(
            f"the config names _target_ {target}, a function: only those of {' and '.join(FUNCTIONS)} may be named"
        )


def build(config: Any, *args: Any, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate` of a checked config."""
    check_targets(config)
    return hydra.utils.instantiate(config, *args, **kwargs)
