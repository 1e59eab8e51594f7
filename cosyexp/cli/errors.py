"""What went wrong, in one sentence."""

import errno
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from cosyexp import config as schema
from cosyexp.errors import UserError

# lines of Hydra's and OmegaConf's messages that say nothing to a user
NOISE = (
    "To append",
    "reference_type",
    "object_type",
    "See https",
    "full_key",
    "provider=",
    "Config search path",
    "Set the environment",
)


def user_message(error: BaseException) -> str | None:
    """One sentence for what the user can mend; None for what is a fault of ours."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            where = f" ({cause.filename})" if cause.filename else ""
            return f"the disk is full{where}: free some space and repeat the command, nothing that was saved is lost"
        if isinstance(cause, OSError) and cause.filename:
            name = cause.filename2 or cause.filename
            return f"{name} cannot be used: {cause.strerror}; look at the path, or name another"
    return (
        hydra_message(causes)
        if isinstance(error, HydraException | OmegaConfBaseException)
        else None
    )


def hydra_message(causes: list[BaseException]) -> str:
    """What Hydra says, without its noise, with the name that was perhaps meant."""
    if match := re.match(r"Error in call to target '[\w.]*?(\w+)'", str(causes[0])):
        return f"{match[1]} cannot be built with these settings: {causes[-1]}"
    if unread := next(
        (cause for cause in causes if isinstance(cause, OverrideParseException)), None
    ):
        key, equals, _ = unread.override.partition("=")
        if not equals:
            return f"{key} has no value: write {key}=..."
        said = str(unread).splitlines()[0]
        return f"{unread.override} cannot be read ({said}): quote a value that holds =, commas or brackets, '{key}=\"...\"'"
    if match := re.match(r"Ambiguous value for argument '(.*)'", str(causes[0])):
        return f"{match[1]} gives several values: add -m (--multirun) to make a run of each, or put a text that holds commas between quotes"
    lines = [line.strip() for cause in causes for line in str(cause).splitlines()]
    text = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(NOISE)))
    if match := re.search(r"hydra/(launcher|sweeper)/(submitit|optuna)\w*'", text):
        extra = {"submitit": "slurm"}.get(match[2], match[2])
        return f"hydra/{match[1]}= needs a package that is not installed: pip install 'cosyexp[{extra}]'"
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]} must be given, for example {match[1]}=..."
    if "is not in struct" in text:
        text += "; --cfg job shows all names"
    if match := re.search(r"Key '(\w+)' not in '(\w+)'", text):
        known = getattr(schema, match[2], None)
        near = get_close_matches(
            match[1], [field.name for field in fields(known)] if is_dataclass(known) else []
        )
        text += f". Did you mean {' or '.join(near)}?" if near else ""
    return text
