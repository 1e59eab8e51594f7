"""Converts exceptions to the one-sentence messages that the apps print."""

import errno
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from cosyexp.errors import UserError


def user_message(error: BaseException) -> str | None:
    """Returns one sentence about an error that the user can correct; None for a bug.

    Args:
        error: an exception; its causes are looked through too.
    """
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            where = f" ({cause.filename})" if cause.filename else ""
            return (
                f"the disk is full{where}: free some space and repeat the command, nothing that "
                f"was saved is lost"
            )
        if isinstance(cause, OSError) and cause.filename:
            name = cause.filename2 or cause.filename
            return f"{name} cannot be used: {cause.strerror}; check the path, or give another"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_message(causes)
    return None


def _hydra_message(causes: list[BaseException]) -> str:
    """Returns the message of an error of Hydra or OmegaConf, in one line."""
    for error in causes:
        if isinstance(error, OverrideParseException):
            return _unreadable_override(error)
        if isinstance(error, MissingMandatoryValue):
            return f"{error.full_key} must be given, for example {error.full_key}=..."
        if isinstance(error, MissingConfigException) and "submitit" in str(error.missing_cfg_file):
            return (
                "hydra/launcher= needs a package that is not installed: pip install "
                "hydra-submitit-launcher"
            )
        if isinstance(error, MissingConfigException) and error.options:
            return (
                f"there is no config {error.missing_cfg_file}. Available options: "
                f"{' '.join(sorted(error.options))}"
            )
    for error in causes:
        if isinstance(error, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(error, str(causes[0]).splitlines()[0])
    first = str(causes[0]).strip().splitlines()[0]
    for error in causes:
        if isinstance(error, ValidationError):
            return f"{first}: {str(error).splitlines()[0]}" if error is not causes[0] else first
    if isinstance(causes[0], ConfigCompositionException) and first.startswith("Ambiguous value"):
        override = first.partition("'")[2].rpartition("'")[0]
        return (
            f"{override} gives several values: add -m (--multirun) to make a run of each, or put a "
            f"text that holds commas between quotes"
        )
    lines = [line.strip() for error in causes for line in str(error).splitlines()]
    return " ".join(dict.fromkeys(line for line in lines if line))


def _unreadable_override(error: OverrideParseException) -> str:
    key, equals, _ = error.override.partition("=")
    if not equals:
        return f"{key} has no value: write {key}=..."
    return (
        f"{error.override} cannot be read ({str(error).splitlines()[0]}): quote a value that holds "
        f"=, commas or brackets, '{key}=\"...\"'"
    )


def _unknown_key(error: ConfigKeyError | ConfigAttributeError, override: str) -> str:
    schema, parent = error.object_type, error.parent_node
    known = [f.name for f in fields(schema)] if is_dataclass(schema) else list(parent or ())
    near = get_close_matches(str(error.key), known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    name = error.full_key or error.key
    return f"there is no key {name} ({override}): {hint}--cfg job shows all keys"
