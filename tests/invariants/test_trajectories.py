"""The same training, however it is divided: over micro-batches, over ranks, over padded batches."""

from pathlib import Path

import pytest

from tests.invariants import faults
from tests.invariants.trajectory import assert_same, by_plan, by_rows
from tests.support import MODELS

EIGHT = [3, 11, 0, 7, 5, 2, 9, 1]


def check_accumulation(
    model: str, data: Path, fault: faults.Any = None, double: bool = True
) -> None:
    """n micro-batches are one batch of n times the size."""
    whole = by_rows(model, data, [EIGHT], double=double)
    parts = by_rows(
        model, data, [EIGHT[:2], EIGHT[2:4], EIGHT[4:6], EIGHT[6:]], double=double, fault=fault
    )
    assert_same(whole, parts, double)


def check_uneven(model: str, data: Path, fault: faults.Any = None) -> None:
    """Micro-batches of different sizes weigh by what they hold."""
    assert_same(
        by_rows(model, data, [EIGHT]), by_rows(model, data, [EIGHT[:1], EIGHT[1:]], fault=fault)
    )


def check_ranks(model: str, data: Path, fault: faults.Any = None, double: bool = True) -> None:
    """2 ranks are 1 rank with 2 micro-batches, with dropout; the plan's last step has too few micro-batches for all."""
    one = by_plan(model, data, ranks=1, accumulate=2, double=double)
    assert_same(
        one, by_plan(model, data, ranks=2, accumulate=1, double=double, fault=fault), double
    )


def check_rows(model: str, data: Path, fault: faults.Any = None) -> None:
    """A row alone is the row in a padded batch: two rows together are two micro-batches of one."""
    together = by_rows(model, data, [[3, 11]], fault=fault)
    assert_same(together, by_rows(model, data, [[3], [11]], fault=fault))


def check_clip(model: str, data: Path, fault: faults.Any = None) -> None:
    """No clipping is clipping at a norm that nothing reaches."""
    free = by_rows(model, data, [EIGHT[:4]], "trainer.max_grad_norm=null", fault=fault)
    assert_same(free, by_rows(model, data, [EIGHT[:4]], "trainer.max_grad_norm=1e9", fault=fault))


CHECKS = [check_accumulation, check_uneven, check_ranks, check_rows, check_clip]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_holds(check, model, data):
    check(model, data)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", [check_accumulation, check_ranks], ids=["accumulation", "ranks"])
def test_holds_in_fp32(check, model, data):
    check(model, data, double=False)


@pytest.mark.parametrize("model", MODELS)
def test_four_micro_batches_over_one_two_and_four_ranks(model, data):
    one = by_plan(model, data, ranks=1, accumulate=4)
    assert_same(one, by_plan(model, data, ranks=2, accumulate=2))
    assert_same(one, by_plan(model, data, ranks=4, accumulate=1))


MUTANTS = [
    (check_ranks, "llm", faults.per_rank_mean),
    (check_ranks, "flow", faults.per_rank_mean),
    (check_uneven, "llm", faults.mean_of_means),
    (check_uneven, "hifigan", faults.mean_of_means),
    (check_accumulation, "flow", faults.unkeyed_noise),
    (check_accumulation, "hifigan", faults.unkeyed_noise),
    (check_accumulation, "hifigan", faults.left_frozen),
    (check_clip, "flow", faults.implicit_clip),
    (check_clip, "hifigan", faults.implicit_clip),
    (check_rows, "flow", faults.unmasked_pad),
    (check_rows, "llm", faults.padding_is_answer),
    (check_rows, "hifigan", faults.batch_median),
]


@pytest.mark.parametrize(
    ("check", "model", "fault"), MUTANTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_planted_fault_is_noticed(check, model, fault, data):
    with pytest.raises((AssertionError, RuntimeError)):
        check(model, data, fault=fault)
