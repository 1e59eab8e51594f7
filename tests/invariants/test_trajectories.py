"""A training is the same however it is divided: into micro-batches, by padding.

Over ranks: see test_engines.py.
"""

from pathlib import Path

import pytest

from tests.invariants import faults
from tests.invariants.trajectory import Fault, assert_same, by_rows
from tests.support import MODELS

EIGHT = [3, 11, 0, 7, 5, 2, 9, 1]  # indices of utterances


def check_accumulation(
    model: str, data: Path, fault: Fault | None = None, double: bool = True
) -> None:
    """n micro-batches are one batch of n times the size."""
    parts = [EIGHT[:2], EIGHT[2:4], EIGHT[4:6], EIGHT[6:]]
    whole = by_rows(model, data, [EIGHT], double=double)
    assert_same(whole, by_rows(model, data, parts, double=double, fault=fault), double)


def check_uneven(model: str, data: Path, fault: Fault | None = None) -> None:
    """Micro-batches of different sizes count by their units."""
    whole = by_rows(model, data, [EIGHT])
    assert_same(whole, by_rows(model, data, [EIGHT[:1], EIGHT[1:]], fault=fault))


def check_rows(model: str, data: Path, fault: Fault | None = None) -> None:
    """Two rows in a padded batch are two micro-batches of one row each."""
    together = by_rows(model, data, [[3, 11]], fault=fault)
    assert_same(together, by_rows(model, data, [[3], [11]], fault=fault))


def check_clip(model: str, data: Path, fault: Fault | None = None) -> None:
    """No clipping is clipping to a norm that no gradient reaches."""
    free = by_rows(model, data, [EIGHT[:4]], "trainer.max_grad_norm=null", fault=fault)
    assert_same(free, by_rows(model, data, [EIGHT[:4]], "trainer.max_grad_norm=1e9", fault=fault))


CHECKS = [check_accumulation, check_uneven, check_rows, check_clip]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_holds(check, model, data):
    check(model, data)


@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_are_one_batch_in_fp32(model, data):
    check_accumulation(model, data, double=False)


DISCRIMINATOR = "losses of discriminator differ"
NO_GRADIENT = "element 0 of tensors does not require grad and does not have a grad_fn"
# each with the exception that it causes, and the beginning of its message
MUTANTS = [
    (check_uneven, "llm", faults.mean_of_means, AssertionError, "losses of llm differ"),
    (check_uneven, "hifigan", faults.mean_of_means, AssertionError, DISCRIMINATOR),
    (check_accumulation, "flow", faults.unkeyed_noise, AssertionError, "losses of flow differ"),
    (check_accumulation, "hifigan", faults.unkeyed_noise, AssertionError, DISCRIMINATOR),
    (check_accumulation, "hifigan", faults.left_frozen, RuntimeError, NO_GRADIENT),
    (check_clip, "flow", faults.implicit_clip, AssertionError, "losses of flow differ"),
    (check_clip, "hifigan", faults.implicit_clip, AssertionError, DISCRIMINATOR),
    (check_rows, "flow", faults.unmasked_padding, AssertionError, "losses of flow differ"),
    (check_rows, "llm", faults.padding_as_label, AssertionError, "losses of llm differ"),
    (check_rows, "hifigan", faults.batch_median, AssertionError, DISCRIMINATOR),
]


@pytest.mark.parametrize(
    ("check", "model", "fault", "error", "message"),
    MUTANTS,
    ids=[f"{fault.__name__}-{model}" for _, model, fault, _, _ in MUTANTS],
)
def test_a_planted_fault_is_detected(check, model, fault, error, message, data):
    with pytest.raises(error, match=f"^{message}"):
        check(model, data, fault=fault)
