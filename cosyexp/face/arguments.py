"""What is done to the words of the command line before Hydra parses them."""

import re
from collections.abc import Collection, Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from cosyexp.errors import UserError


def literal(value: str) -> str:
    """A value quoted as Hydra's grammar wants it: commas, equal signs, quotes, backslashes and ${ are only text."""
    value = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + value.replace("${", "\\${") + "'"


def tidy(words: Sequence[str], free: Collection[str], lists: Collection[str]) -> Iterator[str]:
    """`text=Hello, world!` stays one sentence, `precision=fp32,fp16` becomes a list, `run_dir=a=b` a path; a sweep stays as typed.

    free: keys of free text. lists: keys that take several values.
    """
    parser, sweep = OverridesParser.create(), {"-m", "--multirun"} & set(words)
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not sweep and not word.startswith("-"):
            parsed = parse(parser, word)
            if (parsed is None and (key in free or "/" in value)) or (parsed and key in free and not quoted(parsed)):
                word = f"{key}={literal(value)}"
            elif parsed and key in lists and parsed.is_sweep_override():
                word = f"{key}=[{value}]"
        yield word


def parse(parser: OverridesParser, word: str) -> Override | None:
    try:
        return parser.parse_override(word)
    except HydraException:
        return None


def quoted(override: Override) -> bool:
    return isinstance(override._value, QuotedString)


def refuse_added(words: Sequence[str]) -> None:
    """Hydra takes `+typo=1` without a word, even advises it."""
    for word in words:
        if word.startswith("+") and "=" in word and not word.startswith(("+hydra", "++hydra")):
            name = word.split("=")[0]
            raise UserError(f"{name} would add a key that nothing reads: write it without '+', or find its name by --cfg job")
