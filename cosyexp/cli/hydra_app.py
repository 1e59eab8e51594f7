"""The door of an app: its help, its config, and one sentence where something is wrong."""

import importlib
import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

Task = Callable[[Any], Any]

CONFIGS = next(
    path
    for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf")
    if path.is_dir()
)
LONGEST_NAME = 100


def hydra_app(
    config: str, *, free: Collection[str] = (), lists: Collection[str] = ()
) -> Callable[[Task], Callable[[], None]]:
    """Makes a function of a config into an app.

    config: the primary config below conf/. free: keys whose value is free text. lists: keys that take several values.
    """

    def wrap(task: Task) -> Callable[[], None]:
        @wraps(task)
        def app() -> None:
            if {"-h", "--help"} & set(
                sys.argv[1:]
            ):  # Hydra's own help reads every group, which takes a second
                print((sys.modules[task.__module__].__doc__ or "").strip())
                return
            debugging = bool(os.environ.get("HYDRA_FULL_ERROR"))
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print and exit
            from cosyexp.cli.errors import user_message
            from cosyexp.cli.sweep import print_table

            try:
                run_hydra(with_user_errors(task, debugging), config, free, lists)
            except Exception as error:
                if debugging or (sentence := user_message(error)) is None:
                    raise
                sys.exit(f"cosyexp: {sentence}")
            finally:
                print_table()

        return app

    return wrap


def run_hydra(task: Task, config: str, free: Collection[str], lists: Collection[str]) -> None:
    """Composes the config from the command line, and runs the task with it, or a sweep of them."""
    import hydra

    from cosyexp.cli.overrides import normalize_overrides, refuse_added, refuse_ranks

    register()
    refuse_added(sys.argv[1:])
    refuse_ranks(sys.argv[1:])
    sys.argv[1:] = normalize_overrides(sys.argv[1:], free, lists)
    folder, _, name = config.rpartition("/")
    hydra.main(version_base="1.3", config_path=str((CONFIGS / folder).resolve()), config_name=name)(
        task
    )()


def with_user_errors(task: Task, debugging: bool) -> Task:
    """The task with a config that misses nothing; where the user can mend what went wrong, it exits with a sentence.

    The exit passes Hydra, which has words of its own for a failed job. In a sweep the others go on: there it raises.
    """

    @wraps(task)
    def job(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        from cosyexp.cli.errors import user_message
        from cosyexp.errors import UserError

        try:
            if missing := sorted(OmegaConf.missing_keys(cfg)):
                raise UserError(f"{', '.join(missing)} must be given, for example {missing[0]}=...")
            return task(cfg)
        except Exception as error:
            sentence = user_message(error)
            if (
                sweeping := HydraConfig.get().mode == RunMode.MULTIRUN
            ):  # where the error goes may be another node than this
                print(
                    f"cosyexp: {sentence}" if sentence else traceback.format_exc(),
                    file=sys.stderr,
                    flush=True,
                )
            if debugging or sweeping or sentence is None:
                raise
            sys.exit(f"cosyexp: {sentence}")

    return job


def register() -> None:
    """Resolvers, types and launchers that the configs use; also on the nodes of a cluster."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from cosyexp import config as schema

    OmegaConf.register_new_resolver("cosyexp.swept", swept, replace=True)
    with suppress(ModuleNotFoundError):  # the extra `slurm`
        importlib.import_module("cosyexp.cli.queue").register()
    store = (
        ConfigStore.instance().store
    )  # what every app sees, also the one whose configs lie in a folder of their own
    store(
        group="schema", name="door", node=OmegaConf.load(CONFIGS / "door.yaml"), package="_global_"
    )
    for path in sorted((CONFIGS / "door").glob("*/*.yaml")):
        store(group=f"hydra/{path.parent.name}", name=path.stem, node=OmegaConf.load(path))
    for node in (
        schema.TrainConfig,
        schema.PrepareConfig,
        schema.AverageConfig,
        schema.ExportConfig,
        schema.SynthesizeConfig,
        schema.PreferConfig,
    ):
        store(
            group="schema",
            name=node.__name__.removesuffix("Config").lower(),
            node=node,
            package="_global_",
        )


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
