"""The same training under every engine, on one rank and on two: what `engine=` decides is where it runs."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cosyexp.training.launch import launch
from tests.invariants import faults
from tests.invariants.trajectory import STEPS, Trajectory, assert_same, by_plans
from tests.support import MODELS, config

ENGINES = {"ddp": ["engine=ddp"], "fsdp": ["engine=fsdp"]} | {
    f"zero{n}": ["engine=deepspeed", f"engine.stage={n}"] for n in range(4)
}
PAIRS = [
    (engine, model)
    for engine in ENGINES
    for model in MODELS
    if (engine, model) != ("fsdp", "hifigan")
]
FOUR = [(engine, "llm") for engine in ENGINES] + [
    ("ddp", "hifigan"),
    ("zero1", "hifigan"),
    ("zero3", "hifigan"),
    ("fsdp", "flow"),
]
UNCLIPPED = ("trainer.max_grad_norm=null",)
MUTANTS = {  # how a training is divided: ranks, micro-batches of each
    faults.clip_left_out: (1, 2, "zero2", "hifigan", UNCLIPPED),
    faults.bare_backward: (1, 2, "zero3", "llm", ()),
    faults.mean_over_ranks: (2, 1, "fsdp", "llm", ()),
    faults.reduced_too_early: (2, 2, "ddp", "llm", ()),
}
Key = tuple[Any, ...]


def runs() -> list[Key]:
    """(ranks, micro-batches of each, engine, model, words, fault) of all trainings."""
    plain: list[Key] = [(1, n, "ddp", model, (), None) for n in (2, 4) for model in MODELS]
    plain += [(1, 2, engine, "hifigan", UNCLIPPED, None) for engine in ("ddp", "zero2")]
    plain += [(1, 2, engine, model, (), None) for engine, model in PAIRS if engine != "ddp"]
    plain += [(2, 1, engine, model, (), None) for engine, model in PAIRS]
    plain += [(2, 2, engine, model, (), None) for engine, model in FOUR]
    return [*plain, *((*run, fault) for fault, run in MUTANTS.items())]


@pytest.fixture(scope="module")
def found(data: Path) -> dict[Key, Trajectory]:
    """All of them, those of one rank in one process, those of two in two: starting processes takes longer than they do."""
    settings: dict[int, dict[Key, Any]] = {1: {}, 2: {}}
    for key in runs():
        ranks, accumulate, engine, model, words, fault = key
        words = (
            f"engine.nproc_per_node={ranks}",
            f"trainer.accumulate={accumulate}",
            f"run_dir={data}/unused",
            *words,
        )
        settings[ranks][key] = {
            **config(model, data, *ENGINES[engine], *words),
            "double": False,
            "fault": fault,
        }
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        one = alone.submit(by_plans, {"runs": settings[1]}).result()
    return one | launch(
        by_plans, {"engine": {"nproc_per_node": 2, "timeout": 300}, "runs": settings[2]}
    )


def assert_same_training(found: dict[Key, Trajectory], key: Key) -> None:
    """As plain training in one process, with as many micro-batches a step in all."""
    ranks, accumulate, _, model, words, _ = key
    one, other = found[1, ranks * accumulate, "ddp", model, words, None], found[key]
    assert_same(one, other, double=False)
    for name in one.weights:
        for ours, theirs in zip(other.norms, one.norms, strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def id_of(key: Key) -> str:
    ranks, accumulate, engine, model, words, _ = key
    return "-".join([engine, model, f"{ranks}x{accumulate}", *words])


@pytest.mark.parametrize(
    "key",
    [key for key in runs() if not key[-1] and key[:3] not in ((1, 2, "ddp"), (1, 4, "ddp"))],
    ids=id_of,
)
def test_every_engine_trains_the_same(found, key):
    assert len(found[key].losses) == STEPS[key[3]]
    assert_same_training(found, key)


@pytest.mark.parametrize("fault", MUTANTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_noticed(found, fault):
    with pytest.raises(AssertionError):
        assert_same_training(found, (*MUTANTS[fault], fault))
