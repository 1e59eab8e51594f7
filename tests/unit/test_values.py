"""Every value of every config is taken, or refused in one sentence before anything is written."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from omegaconf.errors import OmegaConfBaseException

from cosyexp.cli.compose import compose, compose_train
from cosyexp.cli.errors import user_message
from cosyexp.config import (
    AverageConfig,
    EvaluateConfig,
    ExportConfig,
    PreferConfig,
    PrepareConfig,
    SynthesizeConfig,
    TrainConfig,
    parse,
    to_dict,
)
from cosyexp.errors import UserError
from cosyexp.registry import check
from cosyexp.training.build import build_objective
from cosyexp.training.nodes import check_nodes
from tests.support import MODELS, TINY, family_words

BAD = [math.nan, math.inf, -math.inf, -1, 0, 1e30, 10**30, None, "text", True]
SCHEMAS: dict[str, tuple[type[Any], list[str]]] = {
    "average": (AverageConfig, ["run_dir=r", "method=weighted", "window=[1,2]", "num=3"]),
    "export/config": (ExportConfig, ["run_dir=r"]),
    "synthesize": (SynthesizeConfig, ["text=a"]),
    "evaluate": (EvaluateConfig, ["llm=r", "limit=3"]),
    "prepare": (PrepareConfig, ["speech_tokenizer=kmeans"]),
    "prefer": (PreferConfig, ["run_dir=r", "limit=3"]),
}
ROLES = {
    "method": "method",
    "format": "format",
    "corpus": "corpus",
    "speech_tokenizer": "front_end",
    "speaker_encoder": "front_end",
}
CALLBACKS = "callbacks=[best_checkpoint,early_stopping,monitor,profiler,throughput]"
FULL = [
    "data=parquet",
    "data.train=a",
    "data.valid=b",
    CALLBACKS,
    "data.limit=3",
    "trainer.ema=0.9",
]
TRAININGS = {
    **{f"demo {model}": [f"model={model}", *TINY[model]] for model in MODELS},
    "cosyvoice3 flow": family_words("cosyvoice3", "flow"),
    "cosyvoice2 llm": family_words("cosyvoice2", "llm"),
    "dpo": ["model=llm", "mode=dpo", *TINY["llm"]],
    "noam_hold": ["model=llm", *TINY["llm"], "scheduler=noam_hold", "engine=deepspeed"],
}


# of a training's config, those that stay plain
NODES = ("network", "objective", "optimizer", "scheduler", "engine", "callbacks")


SHARED = ("family", "model", "data")  # groups of several apps


def numbers(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all numbers in a config."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from numbers(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from numbers(value, (*path, i))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path


def changed(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Returns a config with another value at a path."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(node, list):
        return [changed(item, rest, value) if i == first else item for i, item in enumerate(node)]
    return {**node, first: changed(node[first], rest, value)}


def outcome(make: Any) -> str:
    """Returns the sentence that an attempt ends with; empty if it succeeds."""
    try:
        make()
    except (UserError, OmegaConfBaseException) as error:
        message = user_message(error)
        assert message and "\n" not in message
        return message
    return ""


def attempts(values: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the path of every number with every value to try in its place."""
    for path in numbers(values):
        for bad in BAD:
            yield path, bad


def is_nonfinite(value: Any) -> bool:
    """Whether a value is a number that no setting may have."""
    return isinstance(value, float) and not math.isfinite(value)


@pytest.mark.parametrize("training", TRAININGS)
def test_any_number_of_a_training_is_taken_or_refused(training):
    config = compose_train([*FULL, *TRAININGS[training]])
    check_nodes(config)
    values, built = to_dict(config), 0
    for path, bad in attempts({name: values[name] for name in NODES}):
        key = path[0]
        if key == "objective" and path[1].endswith(("optimizer", "scheduler")):
            continue  # a copy of the groups of these names
        now = replace(config, **{key: changed(getattr(config, key), path[1:], bad)})
        message = outcome(lambda now=now: check_nodes(now))
        assert message or not is_nonfinite(bad), (path, bad)
        if not message and key in ("network", "objective"):
            built += 1
            outcome(lambda now=now: build_objective(now))
    assert built


def test_any_number_of_the_typed_groups_is_taken_or_refused():
    values = to_dict(compose_train([*FULL, "model=flow"]))
    typed = {name: value for name, value in values.items() if name not in NODES}
    tried = 0
    for path, bad in attempts(typed):
        now = changed(values, path, bad)
        message = outcome(lambda now=now: check_nodes(parse(TrainConfig, now)))
        assert message or not is_nonfinite(bad), (path, bad)
        tried += 1
    assert tried > 300


@pytest.mark.parametrize("app", SCHEMAS)
def test_any_number_of_the_other_apps_is_taken_or_refused(app):
    schema, words = SCHEMAS[app]
    values = compose(app, words)

    def make(values: Mapping[str, Any]) -> None:
        config = parse(schema, values)
        for key, role in ROLES.items():
            if node := getattr(config, key, None):
                check(node, role, key)
        for name, node in getattr(config, "judge", {}).items():
            check(node, "judge", f"judge.{name}")

    assert not outcome(lambda: make(values))
    own = {name: value for name, value in values.items() if name not in SHARED}
    for path, bad in attempts(own):
        message = outcome(lambda path=path, bad=bad: make(changed(values, path, bad)))
        assert message or not is_nonfinite(bad), (path, bad)
