"""Updates of the ddp engine in one process."""

import io
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cosyexp.objectives.base import Trainable
from cosyexp.training.engines.base import StepReport
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.engines.reducer import buckets

Tensors = Mapping[str, Any]  # and numbers

OPTIMIZERS: dict[str, Any] = {
    "fused AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01, fused=False),
    "fused Adam": partial(torch.optim.Adam, lr=0.1, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


def constant(update: int, lr: float) -> float:
    """A schedule without changes."""
    return lr


def engine_of(
    *modules: nn.Module,
    optimizer: str = "fused AdamW",
    scheduler: Callable[[int, float], float] = constant,
    **options: Any,
) -> DDP:
    """Returns an engine that is set up for networks, named trainable0, trainable1, ..."""
    engine = DDP(**options)
    trainables = {
        f"trainable{i}": Trainable(module, OPTIMIZERS[optimizer], scheduler)
        for i, module in enumerate(modules)
    }
    engine.setup(trainables, [])
    return engine


def net(seed: int = 0) -> nn.Sequential:
    """Returns a small network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def update(engine: DDP, module: nn.Module, scale: float = 1.0, number: int = 0) -> StepReport:
    """Makes an update of trainable0."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    engine.backward("trainable0", module(x).square().sum() * scale)
    return engine.step("trainable0", number)


def everything(engine: DDP, module: nn.Module) -> Tensors:
    """Returns weights and optimizer state."""
    state = engine.optimizers["trainable0"].state_dict()["state"]
    return {
        **module.state_dict(),
        **{f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()},
    }


def copied(tensors: Tensors) -> Tensors:
    """Returns a copy that later updates do not change."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in tensors.items()
    }


def equal(one: Tensors, two: Tensors) -> bool:
    """Whether names and values are the same."""
    return one.keys() == two.keys() and all(
        torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_optimizer(
    optimizer, bad, max_grad_norm
):
    module = net()
    engine = engine_of(module, optimizer=optimizer, max_grad_norm=max_grad_norm)
    assert update(engine, module).applied
    before = copied(everything(engine, module))
    report = update(engine, module, bad, 1)
    assert not report.applied and not torch.isfinite(report.grad_norm)
    assert equal(everything(engine, module), before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_update_leaves_no_trace(optimizer):
    modules = [net(), net()]
    engines = [engine_of(module, optimizer=optimizer) for module in modules]
    assert not update(engines[0], modules[0], math.nan).applied
    for engine, module in zip(engines, modules, strict=True):
        for number in range(3):
            assert update(engine, module, number=number).applied
    assert equal(
        *(everything(engine, module) for engine, module in zip(engines, modules, strict=True))
    )


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6, None])
def test_clipping_is_torch_s(max_grad_norm):
    ours, theirs = net(), net()
    engine, optimizer = (
        engine_of(ours, max_grad_norm=max_grad_norm),
        OPTIMIZERS["fused AdamW"](theirs.parameters()),
    )
    for number in range(3):
        report = update(engine, ours, number=number)
        theirs(
            torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        ).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(
            theirs.parameters(), math.inf if max_grad_norm is None else max_grad_norm
        )
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(report.grad_norm, norm, rtol=1e-6, atol=0)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def test_gradients_of_micro_batches_add_up_and_are_cleared():
    one, two = net(), net()
    engines = engine_of(one), engine_of(two)
    update(engines[0], one, 3.0)
    engines[1].backward(
        "trainable0",
        two(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).square().sum(),
    )
    update(engines[1], two, 2.0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert b.grad is None


class Forked(nn.Module):
    """A network with a layer that only some calls use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.used(x) + (0 * self.unused(x) if both else 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_unused_parameter_is_updated_as_with_a_zero_gradient(optimizer):
    weights = []
    for both in (False, True):
        module = Forked()
        engine = engine_of(module, optimizer=optimizer)
        for number in range(3):
            engine.backward("trainable0", module(torch.ones(1, 4), both).sum())
            assert engine.step("trainable0", number).applied
        weights.append(everything(engine, module))
    assert equal(*weights)


def test_a_rank_without_micro_batches_can_step():
    module = net()
    report = engine_of(module).step("trainable0", 0)
    assert report.applied and report.grad_norm == 0


def test_the_schedule_is_followed_from_the_base_rate():
    module = net()
    engine = engine_of(module, scheduler=lambda number, lr: lr * (number + 1))
    rates = []
    for number in range(3):
        update(engine, module, number=number)
        rates.append(engine.learning_rate("trainable0"))
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_frozen_weights_stay():
    module = net()
    module[0].requires_grad_(False)
    before = copied(module.state_dict())
    update(engine_of(module), module)
    after = module.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])


@pytest.mark.parametrize("mean", [{"ema": 0.5}, {"running_sum": True}], ids=["ema", "sum"])
def test_weight_averages_are_of_the_last_trainable_and_leave_out_skipped_updates(mean):
    first, last = net(), net(1)
    engine = engine_of(first, last, **mean)

    def mean_after(name: str, module: nn.Module, scale: float = 1.0) -> Tensors:
        engine.backward(name, module(torch.ones(1, 4)).sum() * scale)
        engine.step(name, 0)
        return copied(dict(*engine.weight_averages().values()))

    before = mean_after("trainable1", last)
    assert equal(mean_after("trainable0", first), before)
    assert equal(mean_after("trainable1", last, math.nan), before)
    assert not equal(mean_after("trainable1", last), before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_saved_engine_goes_on_as_if_it_had_not_stopped(optimizer, precision, tmp_path):
    straight = net()
    engine = engine_of(
        straight, optimizer=optimizer, precision=precision, ema=0.5, running_sum=True
    )
    for number in range(2):
        update(engine, straight, number=number)
    weights, state = copied(dict(engine.weights("trainable0"))), copied_state(engine, tmp_path)
    means = {name: copied(dict(mean)) for name, mean in engine.weight_averages().items()}
    resumed = net(5)
    other = engine_of(resumed, optimizer=optimizer, precision=precision, ema=0.5, running_sum=True)
    other.load({"trainable0": weights}, means, state, tmp_path)
    for number in range(2, 5):
        update(engine, straight, number=number)
        update(other, resumed, number=number)
    assert equal(everything(engine, straight), everything(other, resumed))
    assert means.keys() == {"ema", "sum"}
    assert all(
        equal(dict(mean), dict(other.weight_averages()[name]))
        for name, mean in engine.weight_averages().items()
    )
    assert engine.scalers["trainable0"].state_dict() == other.scalers["trainable0"].state_dict()


def copied_state(engine: DDP, folder: Path) -> dict[str, Any]:
    """Returns the state of an engine as read from a checkpoint's file."""
    content = io.BytesIO()
    torch.save(engine.save_state(folder), content)
    content.seek(0)
    state: dict[str, Any] = torch.load(content, weights_only=True)
    return state


def test_fp16_lowers_its_scale_when_gradients_overflow():
    module = net()
    engine = engine_of(module, precision="fp16")
    scale = engine.scalers["trainable0"].get_scale()
    assert not update(engine, module, 1e38).applied
    assert engine.scalers["trainable0"].get_scale() == scale / 2
    report = update(engine, module)
    assert report.applied
    reference = net()
    torch.testing.assert_close(
        report.grad_norm, update(engine_of(reference), reference).grad_norm, rtol=1e-3, atol=0
    )


# tensors that are reduced together


@pytest.mark.parametrize("size", [1, 40, 100, 10**6])
def test_buckets_hold_all_tensors_in_order_each_of_one_dtype(size):
    single, double = torch.float32, torch.float64
    tensors = [
        torch.zeros(n, dtype=dtype)
        for n, dtype in ((3, single), (7, single), (2, double), (0, double), (9, single))
    ]
    found = list(buckets(tensors, size))
    assert [id(tensor) for bucket in found for tensor in bucket] == [
        id(tensor) for tensor in tensors
    ]
    for bucket in found:
        assert len({tensor.dtype for tensor in bucket}) == 1
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket) <= size


def test_small_tensors_share_a_bucket():
    assert [len(bucket) for bucket in buckets([torch.zeros(10)] * 6, 120)] == [3, 3]
    assert list(buckets([], 100)) == []
