"""What is done to the words of the command line before Hydra parses them."""

import os
import re
from collections.abc import Collection, Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from cosyexp.distributed import rank_environment
from cosyexp.errors import UserError


def normalize_overrides(
    words: Sequence[str], free: Collection[str], lists: Collection[str]
) -> Iterator[str]:
    """`text=Hello, world!` stays one sentence, `run_dir=a=b` a path, and `precision=fp32,fp16` becomes a list.

    In a sweep (-m) commas part the jobs: text and paths stay as typed, a list is a list of one in each job.
    free: keys of free text. lists: keys that take several values.
    """
    sweep = sweeps(words)
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not word.startswith("-"):
            if key in lists and not value.startswith("["):
                items = [literal(item) if "=" in item else item for item in value.split(",")]
                word = f"{key}=" + (
                    ",".join(f"[{item}]" for item in items) if sweep else f"[{','.join(items)}]"
                )
            elif not sweep and needs_quotes(word, key in free):
                word = f"{key}={literal(value)}"
        yield word


def needs_quotes(word: str, free: bool) -> bool:
    """Whether Hydra would read a free text, or a path, as something else."""
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except HydraException:
        return free or "/" in word
    return free and not isinstance(override._value, QuotedString)


def literal(value: str) -> str:
    """A value quoted as Hydra's grammar wants it: commas, equal signs, quotes, backslashes and ${ are only text."""
    value = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + value.replace("${", "\\${") + "'"


def sweeps(words: Sequence[str]) -> bool:
    return bool({"-m", "--multirun"} & set(words))


def refuse_ranks(words: Sequence[str]) -> None:
    """Every rank would start the whole sweep."""
    if sweeps(words) and rank_environment(os.environ):
        raise UserError(
            "a sweep (-m) starts its ranks itself: run it without torchrun, deepspeed or srun, and give engine.nproc_per_node="
        )


def refuse_added(words: Sequence[str]) -> None:
    """Hydra takes `+typo=1` without a word, even advises it."""
    for word in words:
        if word.startswith("+") and "=" in word and not word.startswith(("+hydra", "++hydra")):
            name = word.split("=")[0]
            raise UserError(
                f"{name} would add a key that nothing reads: write it without '+', or find its name by --cfg job"
            )
