"""A training is the same under every engine, on one rank, on two and on four.

With dropout; the last step of an epoch has fewer micro-batches than ranks.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from cosyexp.config import EngineConfig
from cosyexp.run.tensors import save_tensors
from cosyexp.training.build import build_objective
from cosyexp.training.launch import launch
from tests.invariants import faults
from tests.invariants.trajectory import (
    STEPS,
    Fault,
    Training,
    Trajectory,
    assert_same,
    assert_same_norms,
    by_plans,
)
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
FOUR = [
    ("ddp", "hifigan"),
    ("fsdp", "llm"),
    ("fsdp", "flow"),
    ("zero1", "hifigan"),
    ("zero2", "llm"),
    ("zero3", "hifigan"),
]
UNCLIPPED = ("trainer.max_grad_norm=null",)
# an adapter on weights of the folder of the data, of which a part is frozen
ADAPTER = (
    "adapter=lora",
    "adapter.dora=true",
    "init_from={data}/base.safetensors",
    "trainer.freeze=[text_encoder]",
    "trainer.no_decay=[lora_B]",
    "trainer.layer_decay=0.5",
    "trainer.lr_scales={w_1:3}",
)


class Run(NamedTuple):
    """A training: its ranks, the micro-batches of each rank in a step, and its other settings."""

    ranks: int
    accumulate: int
    engine: str
    model: str
    words: tuple[str, ...] = ()
    fault: Fault | None = None
    double: bool = False

    @property
    def reference(self) -> "Run":
        """Plain training on one rank, with as many micro-batches in a step."""
        micro_batches = self.ranks * self.accumulate
        return Run(1, micro_batches, "ddp", self.model, self.words, double=self.double)

    def __str__(self) -> str:
        precision = ["fp64"] if self.double else []
        division = f"{self.ranks}x{self.accumulate}"
        return "-".join([self.engine, self.model, division, *precision, *self.words[:1]])


# each with the beginning of the message of its AssertionError, as a regex
MUTANTS = {
    Run(
        1, 2, "zero2", "hifigan", UNCLIPPED, faults.clip_left_out
    ): "(losses|norms) of hifigan differ",
    Run(1, 2, "zero3", "llm", fault=faults.bare_backward): "losses of llm differ",
    Run(2, 1, "fsdp", "llm", fault=faults.mean_over_ranks): "norms of llm differ",
    Run(2, 2, "ddp", "llm", fault=faults.reduced_too_early): "losses of llm differ",
    **{
        Run(
            2, 1, "ddp", model, fault=faults.per_rank_mean, double=True
        ): f"losses of {model} differ"
        for model in ("llm", "flow")
    },
}
RUNS = [
    Run(1, 2, "zero2", "hifigan", UNCLIPPED),
    *(Run(1, 2, engine, model) for engine, model in PAIRS if engine != "ddp"),
    *(Run(2, 1, engine, model) for engine, model in PAIRS),
    *(Run(2, 2, engine, model) for engine, model in FOUR),
    *(Run(2, 1, engine, "llm", ADAPTER) for engine in ("ddp", "fsdp", "zero2", "zero3")),
    *(
        Run(ranks, accumulate, "ddp", model, double=True)
        for ranks, accumulate in ((2, 1), (2, 2), (4, 1))
        for model in MODELS
    ),
]


@pytest.fixture(scope="module")
def trajectories(data: Path) -> dict[Run, Trajectory]:
    """Runs all trainings of one, two and four ranks, each in the same processes.

    Starting processes takes longer than training.
    """
    random = build_objective(config("llm", data, f"run_dir={data}/unused"))
    save_tensors(data / "base.safetensors", random.trainables["llm"].module.state_dict())
    trainings: dict[int, dict[Run, Training]] = {1: {}, 2: {}, 4: {}}
    for run in {*RUNS, *MUTANTS, *(run.reference for run in [*RUNS, *MUTANTS])}:
        words = (
            f"engine.nproc_per_node={run.ranks}",
            f"trainer.accumulate={run.accumulate}",
            f"run_dir={data}/unused",
            *ENGINES[run.engine],
            *(word.replace("{data}", str(data)) for word in run.words),
        )
        training = Training(config(run.model, data, *words), run.double, run.fault)
        trainings[run.ranks][run] = training
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(by_plans, trainings[1]).result()
    for ranks in (2, 4):
        engine = EngineConfig(nproc_per_node=ranks, timeout=300)
        found |= launch(by_plans, trainings[ranks], engine)
    return found


def assert_same_training(trajectories: dict[Run, Trajectory], run: Run) -> None:
    reference, other = trajectories[run.reference], trajectories[run]
    assert_same(reference, other, run.double)
    for name in reference.weights if not run.double else ():
        assert_same_norms(reference, other, name, 1e-5)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_engine_trains_the_same(trajectories, run):
    assert len(trajectories[run].losses) == STEPS[run.model]
    assert_same_training(trajectories, run)


@pytest.mark.parametrize("run", MUTANTS, ids=lambda run: run.fault.__name__)
def test_a_planted_fault_is_detected(trajectories, run):
    with pytest.raises(AssertionError, match=f"^{MUTANTS[run]}"):
        assert_same_training(trajectories, run)
