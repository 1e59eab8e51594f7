"""The decorator of the apps' entry points: help, typed config, and one-line user errors."""

import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

CONFIG_DIR = next(
    path
    for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf")
    if path.is_dir()
)
MAX_NAME = 100  # characters of the part of a name that tells the jobs of a sweep apart

Task = Callable[[Any], Any]


def hydra_app(
    config_name: str,
    schema: type[Any],
    *,
    free: Collection[str] = (),
    lists: Collection[str] = (),
    complete: Callable[[Any], None] | None = None,
) -> Callable[[Task], Callable[[], None]]:
    """Decorator for a Hydra app's entry point, a function of a typed config.

    Args:
        config_name: the primary config, below conf/.
        schema: the dataclass in `cosyexp.config` that the function is given.
        free: keys whose value is free text, with commas and quotes as typed.
        lists: keys that take several values, `precision=fp32,fp16`.
        complete: called with the composed DictConfig before it is resolved.
    """

    def wrap(task: Task) -> Callable[[], None]:
        @wraps(task)
        def app() -> None:
            if {"-h", "--help"} & set(sys.argv[1:]):
                # Hydra's own help reads every group, which takes a second
                print((sys.modules[task.__module__].__doc__ or "").strip())
                return
            debug = bool(os.environ.get("HYDRA_FULL_ERROR"))
            # Hydra then raises where it would print a message and exit
            os.environ["HYDRA_FULL_ERROR"] = "1"
            from cosyexp.cli.errors import user_message
            from cosyexp.cli.sweep import print_table

            try:
                _run_hydra(
                    _with_user_errors(task, schema, complete, debug), config_name, free, lists
                )
            except KeyboardInterrupt:
                if debug:
                    raise
                sys.exit(130)  # what a shell reports of Ctrl-C
            except Exception as error:
                if debug or (message := user_message(error)) is None:
                    raise
                sys.exit(f"cosyexp: {message}")
            finally:
                print_table()

        return app

    return wrap


def _run_hydra(task: Task, config: str, free: Collection[str], lists: Collection[str]) -> None:
    """Composes the config from the command line and runs the task with it, or a sweep."""
    import hydra

    from cosyexp.cli.mode import composed_once
    from cosyexp.cli.overrides import (
        add_config_dir,
        check_flags,
        normalize_overrides,
        overrides_first,
    )

    register()
    check_flags(sys.argv[1:])
    folder, _, name = config.rpartition("/")
    words = list(normalize_overrides(sys.argv[1:], free, lists))
    sys.argv[1:] = overrides_first(add_config_dir(words, folder))
    path = str((CONFIG_DIR / folder).resolve())
    with composed_once(sys.argv[1:]):
        hydra.main(version_base="1.3", config_path=path, config_name=name)(task)()


def _with_user_errors(
    task: Task, schema: type[Any], complete: Callable[[Any], None] | None, debug: bool
) -> Task:
    """Gives the task its typed config, and turns user errors into one line and exit code 1.

    The exit bypasses Hydra's own report of a failed job. In a sweep the error is raised instead, so
    that the other jobs go on.
    """

    @wraps(task)
    def job(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        from cosyexp.cli.errors import user_message
        from cosyexp.config import parse
        from cosyexp.errors import UserError
        from cosyexp.registry import trust

        try:
            if complete is not None:
                complete(cfg)
            if missing := sorted(_missing_keys(OmegaConf.to_container(cfg))):
                raise UserError(f"{', '.join(missing)} must be given, for example {missing[0]}=...")
            values: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
            config = parse(schema, values)
            trust(config.trusted)
            return task(config)
        except Exception as error:
            message = user_message(error)
            in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
            if in_sweep:  # the error may be reported on another node than this
                text = f"cosyexp: {message}" if message else traceback.format_exc()
                print(text, file=sys.stderr, flush=True)
            if debug or in_sweep or message is None:
                raise
            sys.exit(f"cosyexp: {message}")

    return job


def _missing_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the keys that must be given; OmegaConf's own function fails where others use them."""
    for key, value in node.items():
        if value == "???":
            yield f"{prefix}{key}"
        elif isinstance(value, dict):
            yield from _missing_keys(value, f"{prefix}{key}.")


@cache
def register() -> None:
    """Registers the resolvers and the types that the configs use, also on a cluster's nodes."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from cosyexp import config

    OmegaConf.register_new_resolver("cosyexp.swept", swept, replace=True)
    schemas = {
        "train": config.TrainConfig,
        "prepare": config.PrepareConfig,
        "prefer": config.PreferConfig,
        "average": config.AverageConfig,
        "compare": config.CompareConfig,
        "evaluate": config.EvaluateConfig,
        "export": config.ExportConfig,
        "synthesize": config.SynthesizeConfig,
        "push": config.PushConfig,
        "pull": config.PullConfig,
    }
    for name, schema in schemas.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema, package="_global_")


def swept() -> str:
    """Returns the part of a job's name that identifies it in a sweep, as `+optimizer.lr-0.0001`.

    Outside of a sweep it is empty.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    name = HydraConfig.get().job.override_dirname
    short = re.sub(r"[^A-Za-z0-9_.+-]", "_", name)
    if short != name or len(short) > MAX_NAME:
        short = f"{short[: MAX_NAME - 10]}-{zlib.crc32(name.encode()):08x}"
    return f"+{short}" if name else ""
