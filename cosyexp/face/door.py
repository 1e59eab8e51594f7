"""The door of an app: help, Hydra, one-sentence errors, and the table of a sweep."""

import errno
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any

Task = Callable[[Any], Any]

CONFIGS = next(path for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if path.is_dir())
LONGEST_NAME = 100


def swept() -> str:
    """What tells a job of a sweep from the others, '+optimizer.lr-0.0001'; empty for a single run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    name = HydraConfig.get().job.override_dirname
    short = re.sub(r"[^A-Za-z0-9_.+-]", "_", name)
    if short != name or len(short) > LONGEST_NAME:
        short = f"{short[: LONGEST_NAME - 10]}-{zlib.crc32(name.encode()):08x}"
    return f"+{short}" if name else ""


def register() -> None:
    """Resolvers and types that the configs use; also on the nodes of a cluster."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from cosyexp import schema

    OmegaConf.register_new_resolver("cosyexp.swept", swept, replace=True)
    OmegaConf.register_new_resolver("cosyexp.conf", lambda: str(CONFIGS.resolve()), replace=True)
    for name, node in (("train", schema.Train), ("average", schema.Average), ("export", schema.Export), ("synthesize", schema.Synthesize), ("prepare", schema.Prepare)):
        ConfigStore.instance().store(group="schema", name=name, node=node, package="_global_")


def door(config: str, *, free: Collection[str] = (), lists: Collection[str] = ()) -> Callable[[Task], Callable[[], None]]:
    """Makes a function of a config into an app.

    config: the primary config below conf/. free: keys whose value is free text. lists: keys that take several values.
    """

    def wrap(task: Task) -> Callable[[], None]:
        @wraps(task)
        def app() -> None:
            words = sys.argv[1:]
            if {"-h", "--help"} & set(words):  # Hydra's own help reads every group, which takes a second
                print((sys.modules[task.__module__].__doc__ or "").strip())
                return
            debugging = "HYDRA_FULL_ERROR" in os.environ
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print and exit
            from cosyexp.face import sweep

            try:
                _run(task, config, words, free, lists)
            except Exception as error:
                sentence = explain(error)
                if debugging or sentence is None:
                    raise
                sys.exit(f"cosyexp: {sentence}")
            finally:
                if not debugging:
                    del os.environ["HYDRA_FULL_ERROR"]
                sweep.print_table()

        return app

    return wrap


def _run(task: Task, config: str, words: list[str], free: Collection[str], lists: Collection[str]) -> None:
    import hydra
    from omegaconf import OmegaConf

    from cosyexp.errors import UserError
    from cosyexp.face.arguments import refuse_added, tidy

    register()
    refuse_added(words)
    sys.argv[1:] = tidy(words, free, lists)

    def job(cfg: Any) -> Any:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{', '.join(missing)} must be given, for example {missing[0]}=...")
        OmegaConf.resolve(cfg)  # child processes have no HydraConfig: nothing is left to resolve
        return task(cfg)

    folder, _, name = config.rpartition("/")
    hydra.main(version_base="1.3", config_path=str((CONFIGS / folder).resolve()), config_name=name)(wraps(task)(job))()


def explain(error: BaseException) -> str | None:
    """One sentence for what the user can mend; None for what is a fault of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from cosyexp.errors import UserError

    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return f"the disk is full ({cause.filename or 'while writing'}): free some space and repeat the command, nothing that was saved is lost"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    return _hydra_sentence(causes)


NOISE = ("To append", "reference_type", "object_type", "See https", "full_key", "provider=", "Config search path", "Set the environment")


def _hydra_sentence(causes: list[BaseException]) -> str:
    from cosyexp import schema

    lines = [line.strip() for cause in causes for line in str(cause).splitlines()]
    text = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(NOISE)))
    if match := re.search(r"Key '(\w+)' not in '(\w+)'", text):
        known = getattr(schema, match[2], None)
        names = [field.name for field in fields(known)] if is_dataclass(known) else []
        near = get_close_matches(match[1], names)
        text += f". Did you mean {' or '.join(near)}?" if near else ""
    return text
