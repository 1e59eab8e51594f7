"""Checks the nodes of a training's config that name a class, before anything is built."""

from collections.abc import Mapping
from typing import Any

from cosyexp.config import TrainConfig
from cosyexp.registry import check


def check_nodes(config: TrainConfig) -> None:
    """Checks the classes and the arguments of all nodes of a config, before anything is built.

    Raises:
        UserError: one of them is not valid.
    """
    nodes: dict[str, tuple[str, Mapping[str, Any]]] = {
        "network": ("network", config.network),
        "optimizer": ("optimizer", config.optimizer),
        "scheduler": ("scheduler", config.scheduler),
        "objective": ("objective", config.objective),
        "family.tokenizer": ("tokenizer", config.family.tokenizer),
        "family.sampler": ("token_sampler", config.family.sampler),
        "model.collator": ("collator", config.model.collator),
        "engine": ("engine", engine_node(config)),
    }
    if config.adapter:
        nodes["adapter"] = ("adapter", config.adapter)
    if config.data.corpus:
        nodes["data.corpus"] = ("corpus", config.data.corpus)
    for group, role in (("callbacks", "callback"), ("metrics", "metric"), ("logger", "logger")):
        nodes |= {f"{group}.{name}": (role, node) for name, node in getattr(config, group).items()}
    for path, (role, node) in nodes.items():
        check(node, role, path)


def engine_node(config: TrainConfig) -> dict[str, Any]:
    """Returns the config of the engine without the keys of its launch."""
    return {k: v for k, v in config.engine.items() if k not in ("nproc_per_node", "threads")}
