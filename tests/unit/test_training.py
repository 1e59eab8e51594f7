"""Schedules, weight averages, meters, the guard against non-finite updates, and signals."""

import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cosyexp.config import OnNonfinite, Precision
from cosyexp.errors import UserError
from cosyexp.objectives.base import Loss
from cosyexp.training.engines.base import StepReport
from cosyexp.training.meters import Meter, means, merged, to_host
from cosyexp.training.nonfinite import PATIENCE, NonFiniteGuard
from cosyexp.training.schedules import constant, noam_hold, warmup
from cosyexp.training.signals import StopRequest
from cosyexp.training.weight_averages import EMA, RunningSum

# schedules


@given(st.integers(1, 3000), st.floats(1e-6, 1.0))
def test_warmup_rises_evenly_to_its_peak_then_falls_with_the_root(steps, lr):
    rates = [warmup(update, lr, steps=steps) for update in range(2 * steps + 2)]
    assert math.isclose(rates[0], lr / steps) and math.isclose(max(rates), lr)
    assert math.isclose(rates[steps - 1], max(rates))
    assert math.isclose(rates[2 * steps - 1], lr / math.sqrt(2))


def test_warmup_of_no_steps_falls_from_the_start():
    assert [warmup(update, 1.0, steps=0) for update in (0, 3, 99)] == [1.0, 0.5, 0.1]


def test_constant_is_constant():
    assert {constant(update, 0.3) for update in range(100)} == {0.3}


def test_noam_hold_has_a_plateau_at_the_base_rate():
    rates = [noam_hold(update, 1.0, steps=1000, warmup=100, hold=300) for update in range(1000)]
    assert rates[:101] == sorted(rates[:101]) and rates[0] > 0
    assert [update for update, rate in enumerate(rates) if rate == 1.0] == list(range(100, 401))
    assert rates[400:] == sorted(rates[400:], reverse=True) and rates[-1] < 0.5


def test_noam_hold_takes_shares_of_the_steps():
    shares, numbers = {"warmup": 0.1, "hold": 0.3}, {"warmup": 100, "hold": 300}
    for update in range(0, 1000, 7):
        assert noam_hold(update, 1.0, steps=1000, **shares) == noam_hold(
            update, 1.0, steps=1000, **numbers
        )


def test_noam_hold_never_falls_below_its_lowest_rate():
    rates = [
        noam_hold(update, 1.0, steps=500, warmup=10, decay=2.0, lowest=0.01)
        for update in range(600)
    ]
    assert min(rates[10:]) == 0.01 and set(rates[501:]) == {0.01}


# weight averages


class Counted(nn.Module):
    """A network with weights of two types and buffers of two others."""

    count: torch.Tensor
    flag: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.small = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flag", torch.tensor(False))

    @torch.no_grad()
    def change(self, update: int) -> None:
        """Changes all weights and buffers."""
        draw = torch.Generator().manual_seed(update)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        self.count.fill_(update)
        self.flag.fill_(update % 2 == 1)


def test_the_ema_is_that_of_a_plain_loop():
    module = Counted()
    ema = EMA(module.state_dict(), 0.9)
    mean = {
        name: tensor.double()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }
    for update in range(1, 200):
        module.change(update)
        ema.update(update, torch.tensor(True))
        decay = min(0.9, (1 + update) / (10 + update))
        mean = {
            name: decay * old + (1 - decay) * module.state_dict()[name].double()
            for name, old in mean.items()
        }
    found = dict(ema.items())
    for name, wanted in mean.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=1e-6)
    assert found["count"] == 199 and found["flag"] and found["count"].dtype == torch.int64


def test_a_skipped_update_leaves_the_ema():
    module = Counted()
    ema = EMA(module.state_dict(), 0.9)
    module.change(1)
    ema.update(1, torch.tensor(True))
    before = {name: tensor.clone() for name, tensor in ema.items()}
    module.change(2)
    ema.update(2, torch.tensor(False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.items())


def test_the_ema_shares_no_memory_with_the_weights():
    module = Counted()
    ema, before = EMA(module.state_dict(), 0.9), module.linear.weight.clone()
    module.change(1)
    assert torch.equal(dict(ema.items())["linear.weight"], before)


def test_a_loaded_ema_goes_on():
    one, two = Counted(), Counted()
    first = EMA(one.state_dict(), 0.9)
    one.change(1)
    first.update(1, torch.tensor(True))
    second = EMA(two.state_dict(), 0.9)
    second.load({name: tensor.clone() for name, tensor in first.items()})
    for module, ema in ((one, first), (two, second)):
        module.change(2)
        ema.update(2, torch.tensor(True))
    assert all(torch.equal(tensor, dict(second.items())[name]) for name, tensor in first.items())


def test_a_running_sum_has_the_mean_of_any_steps_to_the_last_digit_of_fp32():
    """After 1e5 steps, where a sum in fp32 would have no digit left of the next 1000 weights."""
    module = Counted()
    total, wanted = RunningSum(module.state_dict()), torch.zeros(2, 3, dtype=torch.float64)
    total.load({name: tensor + 1e5 * 0.7 for name, tensor in total.items()})  # as after 1e5 steps
    before = dict(total.items())["linear.weight"].clone()
    for update in range(1, 1001):
        module.change(update)
        total.update(update, torch.tensor(update % 10 > 0))  # every tenth is skipped
        wanted += module.linear.weight.detach().double() if update % 10 else 0
    found = dict(total.items())["linear.weight"] - before
    torch.testing.assert_close(found / 900, wanted / 900, rtol=0, atol=1e-10)
    assert {tensor.dtype for _, tensor in total.items()} == {torch.float64} and "count" not in dict(
        total.items()
    )


# meters


def loss(mse: float, acc: float = 1.0) -> Loss:
    """Returns a loss of two terms."""
    return Loss(mse=(torch.tensor(mse), "frames", 2.0), acc=(torch.tensor(acc), "rows", 0.0))


def test_means_divide_each_term_by_its_own_units():
    found = means([to_host(loss(3.0)), to_host(loss(5.0, 2.0))], {"frames": 16, "rows": 4})
    assert found == {"loss": 1.0, "mse": 0.5, "acc": 0.75}


def test_sums_are_kept_in_fp64():
    metrics = Meter()
    report = StepReport(torch.tensor(1.0), torch.tensor(True))
    for _ in range(1000):
        metrics.add([loss(2.0**24).detach(), loss(1.0).detach()], {"frames": 1, "rows": 1}, report)
    assert metrics.state_dict()["loss"]["mse"][0] == 1000 * (2.0**24 + 1)


def test_the_ranks_sums_are_merged():
    ranks = []
    for value in (1.0, 2.0):
        ranks.append(Meter())
        ranks[-1].add(
            [loss(value)],
            {"frames": 6, "rows": 2},
            StepReport(torch.tensor(7.0), torch.tensor(True)),
        )
    ranks.append(Meter())  # a rank without micro-batches
    ranks[-1].add([], {"frames": 6, "rows": 2}, StepReport(torch.tensor(7.0), torch.tensor(True)))
    found = merged([rank.state_dict() for rank in ranks])
    assert found["loss"]["mse"] == (3.0, "frames", 2.0) and found["units"] == {
        "frames": 6,
        "rows": 2,
    }
    assert found["norm"] == 7.0 and found["updates"] == 1


def test_sums_go_on_after_a_resume():
    straight, first = Meter(), Meter()
    report = StepReport(torch.tensor(2.0), torch.tensor(True))
    for metrics in (straight, first):
        metrics.add([loss(1.0)], {"frames": 3, "rows": 1}, report)
    second = Meter()
    second.load(first.state_dict())
    for metrics in (straight, second):
        metrics.add([loss(4.0)], {"frames": 5, "rows": 1}, report)
    assert second.state_dict() == straight.state_dict()


# non-finite updates

BAD, GOOD = (
    StepReport(torch.tensor(math.nan), torch.tensor(False)),
    StepReport(torch.tensor(1.0), torch.tensor(True)),
)


def guard_of(
    tmp_path: Path,
    precision: Precision = Precision.fp32,
    policy: OnNonfinite = OnNonfinite.stop,
) -> NonFiniteGuard:
    """Returns a guard whose dumps go to a folder `logs`."""
    return NonFiniteGuard(tmp_path / "logs", 0, precision, policy)


def test_a_run_stops_at_a_loss_that_is_not_finite_and_names_the_utterances(tmp_path):
    guard = guard_of(tmp_path)
    guard.add(7, "llm", ("utt_a", "utt_b"), [loss(1.0), loss(math.nan)], BAD)
    assert guard.check(7), "the step is not over yet"
    with pytest.raises(
        UserError, match=r"at step 7 the loss of llm .*trainer.on_nonfinite=skip"
    ) as error:
        guard.check(8)
    (dump,) = (tmp_path / "logs").iterdir()
    assert str(dump) in str(error.value)
    assert json.loads(dump.read_text())["utterances"] == ["utt_a", "utt_b"]


def test_gradients_that_are_not_finite_are_told_from_the_loss(tmp_path):
    guard = guard_of(tmp_path)
    guard.add(7, "flow", ("a",), [loss(1.0)], BAD)
    with pytest.raises(UserError, match="the gradients of flow became NaN or infinite"):
        guard.check(8)


def test_skipping_ends_after_so_many_in_a_row(tmp_path, said):
    guard = guard_of(tmp_path, policy=OnNonfinite.skip)
    for _ in range(PATIENCE - 1):
        guard.add(3, "llm", ("a",), [loss(math.nan)], BAD)
        assert not guard.check(4)
    guard.add(3, "llm", ("a",), [loss(1.0)], GOOD)
    assert guard.check(4) and "step 3: the update of llm was skipped" in said.text
    for _ in range(PATIENCE - 1):
        guard.add(4, "llm", ("a",), [loss(math.nan)], BAD)
        assert not guard.check(5)
    guard.add(4, "llm", ("a",), [loss(math.nan)], BAD)
    with pytest.raises(UserError, match="at step 4"):
        guard.check(5)


def test_updates_of_one_trainable_do_not_count_for_another(tmp_path):
    guard = guard_of(tmp_path, policy=OnNonfinite.skip)
    with pytest.raises(UserError, match="hifigan"):
        for _ in range(2 * PATIENCE):
            guard.add(3, "discriminator", ("a",), [loss(1.0)], GOOD)
            assert guard.check(4)
            guard.add(3, "hifigan", ("a",), [loss(math.nan)], BAD)
            assert not guard.check(4)


def test_fp16_skips_non_finite_gradients_but_no_loss(tmp_path):
    guard = guard_of(tmp_path, precision=Precision.fp16)
    guard.add(0, "llm", ("a",), [loss(1.0)], BAD)
    assert not guard.check(1)
    guard.add(0, "llm", ("a",), [loss(math.inf)], BAD)
    with pytest.raises(UserError, match="at step 0 the loss of llm"):
        guard.check(1)


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_a_flag_and_the_second_has_its_old_effect(number):
    before, received = signal.getsignal(number), []
    signal.signal(number, lambda *_: received.append(number))
    try:
        with StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.signal == number and not received
            os.kill(os.getpid(), number)
            assert received == [number]
    finally:
        signal.signal(number, before)


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# what the ranks agree on


def summed(*others: Sequence[float]) -> Callable[[Sequence[float]], list[float]]:
    """Returns a sum over ranks, of which the others have these values."""
    return lambda own: [sum(values) for values in zip(own, *others, strict=True)]


@pytest.mark.parametrize(
    ("others", "agreed", "preempted"),
    [
        ([0.0, 0.0, 0.0], (False, False), False),
        ([1.0, 0.0, 0.0], (True, False), False),
        ([1.0, 1.0, 0.0], (True, False), True),
        ([0.0, 0.0, 1.0], (False, True), False),
    ],
)
def test_a_request_of_any_rank_holds_for_all(others, agreed, preempted):
    stop = StopRequest()
    assert stop.agreed(summed(others, [0.0, 0.0, 0.0])) == agreed
    assert stop.preempted == preempted


def test_a_callback_of_this_rank_ends_the_training_of_all():
    stop = StopRequest()
    assert stop.agreed(list, ended=True) == (False, True)
    assert stop.agreed(list) == (False, False)


def test_a_preemption_is_a_request_that_may_come_twice():
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.agreed(list) == (True, False) and stop.preempted


def test_a_preemption_announced_while_the_ranks_agree_holds_at_the_next_step():
    def preempted_meanwhile(own: Sequence[float]) -> list[float]:
        os.kill(os.getpid(), signal.SIGUSR2)
        return list(own)

    with StopRequest() as stop:
        assert stop.agreed(preempted_meanwhile) == (False, False) and not stop.preempted
        assert stop.agreed(list) == (True, False) and stop.preempted
