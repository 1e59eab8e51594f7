"""Normalizes the command line before Hydra parses it."""

import os
import re
from collections.abc import Collection, Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from cosyexp.distributed import rank_environment
from cosyexp.errors import UserError

ALIASES = {
    "trainer.clip": "trainer.max_grad_norm",
    "tokenizer.extra": "family.tokenizer.extra",
}
OVERLAYS = ("experiment", "debug", "hparams_search")  # null by default: + changes nothing
CONFIG_DIR_FLAGS = ("-cd", "--config-dir")
WITH_VALUE = {*CONFIG_DIR_FLAGS, "-cp", "--config-path", "-cn", "--config-name", "-c", "--cfg"}
WITH_VALUE |= {"-p", "--package", "--experimental-rerun"}
MULTIRUN = {"-m", "--multirun"}
# passed by the launchers of DeepSpeed and of older torch, which set LOCAL_RANK as well
LOCAL_RANK_FLAG = re.compile(r"--local[-_]rank=\d+")
SHOW = {"-c", "--cfg", "-i", "--info", "-sc", "--shell-completion", "-r", "--run"}


def normalize_overrides(
    words: Sequence[str], free: Collection[str], lists: Collection[str]
) -> Iterator[str]:
    """Yields the command line in Hydra's grammar.

    `text=Hello, world!` stays one sentence, a path that the grammar does not know is quoted,
    `precision=fp32,fp16` becomes a list, `+experiment=x` becomes `experiment=x`, `experiment=null`,
    which is the default, is left out, an alias of a key becomes its name, and a launcher's
    `--local_rank=0` is left out. In a sweep (-m) commas separate the jobs: text and
    paths stay as typed, a list has one item in each job.

    Args:
        words: the arguments of the command.
        free: keys whose value is free text.
        lists: keys that take several values.
    """
    sweep = is_sweep(words)
    for word in words:
        if LOCAL_RANK_FLAG.fullmatch(word):
            continue
        key, equals, value = word.partition("=")
        if equals and key.lstrip("+") in OVERLAYS:
            key = key.lstrip("+")
            if value == "null":  # Hydra's grammar of groups does not know it
                continue
        key = ALIASES.get(key, key)
        word = f"{key}{equals}{value}"
        if equals and not word.startswith("-"):
            if key in lists and not value.startswith("["):
                items = [quote(item) if "=" in item else item for item in value.split(",")]
                joined = ",".join(f"[{item}]" for item in items)
                word = f"{key}=" + (joined if sweep else f"[{','.join(items)}]")
            elif not sweep and _needs_quotes(word, key in free):
                word = f"{key}={quote(value)}"
        yield word


def _needs_quotes(word: str, free: bool) -> bool:
    """Returns whether Hydra would misread free text or a path without quotes."""
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except HydraException:
        return free or "/" in word
    return free and not isinstance(override._value, QuotedString)


def add_config_dir(words: Sequence[str], inside: str) -> list[str]:
    """Lets `--config-dir` hold the groups of an app whose primary config is in a subfolder.

    `--config-dir mine` finds `mine/export/format/x.yaml` for the export app, as in conf/.

    Args:
        words: the arguments of the command.
        inside: the subfolder of conf/ with the app's primary config; empty for most apps.
    """
    added = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if inside and flag in CONFIG_DIR_FLAGS and (folder := value if equals else following):
            nested = os.path.abspath(os.path.join(folder, inside))
            if os.path.isdir(nested):
                added.append(f"hydra.searchpath=[{quote(f'file://{nested}')}]")
    return [*added, *words]


def overrides_first(words: Sequence[str]) -> list[str]:
    """Sorts the overrides before the flags, which argparse does not take between overrides."""
    overrides: list[str] = []
    flags: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        shown = before in ("-i", "--info") and "=" not in word  # --info defaults-tree
        is_flag = word.startswith("-") or before in WITH_VALUE or shown
        (flags if is_flag else overrides).append(word)
    return [*overrides, *flags]


def quote(value: str) -> str:
    """Quotes a value, so that Hydra takes commas, equal signs, quotes and ${ literally."""
    value = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + value.replace("${", "\\${") + "'"


def is_sweep(words: Sequence[str]) -> bool:
    """Returns whether the command line asks for a sweep."""
    return bool(MULTIRUN & set(words))


def check_flags(words: Sequence[str]) -> None:
    """Checks that a sweep is not combined with flags or launchers that exclude it.

    Raises:
        UserError: a sweep is also asked to show its config, or is started by a launcher of ranks,
            where every rank would start the whole sweep.
    """
    if not is_sweep(words):
        return
    if shown := SHOW & {word.split("=")[0] for word in words}:
        raise UserError(
            f"-m and {sorted(shown)[0]} exclude each other, as in every Hydra app: leave out -m to "
            f"see the config of one job"
        )
    if rank_environment(os.environ):
        raise UserError(
            "a sweep (-m) starts its ranks itself: run it without torchrun, deepspeed or srun, and "
            "give engine.nproc_per_node="
        )
