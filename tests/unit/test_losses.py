"""The losses against straightforward formulas, and what an objective yields."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from cosyexp.objectives.base import Loss, Trainable, frozen
from cosyexp.objectives.losses.adversarial import (
    discriminator_loss,
    feature_loss,
    generator_loss,
    tpr_loss,
)
from cosyexp.objectives.losses.cross_entropy import hits, token_loss

CLASSES = 7
Maps = list[list[Tensor]]  # of each discriminator and layer

# tokens


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and the mask of valid tokens."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 9, CLASSES, generator=draw, dtype=torch.float64)
    targets = torch.randint(CLASSES, (4, 9), generator=draw)
    return logits, targets, torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]


def test_the_token_loss_is_the_cross_entropy_of_valid_tokens(tokens):
    logits, targets, valid = tokens
    assert_close(
        token_loss(logits, targets, valid),
        functional.cross_entropy(logits[valid], targets[valid], reduction="sum"),
    )


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.5])
def test_label_smoothing_is_a_divergence_from_a_soft_target(tokens, smoothing):
    logits, targets, valid = tokens
    soft = torch.full_like(logits, smoothing / (CLASSES - 1)).scatter(
        -1, targets.unsqueeze(-1), 1 - smoothing
    )
    wanted = functional.kl_div(logits.log_softmax(-1)[valid], soft[valid], reduction="sum")
    assert_close(token_loss(logits, targets, valid, smoothing), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padded_tokens_give_neither_loss_nor_gradient(tokens, smoothing):
    logits, targets, valid = tokens
    logits.requires_grad_()
    token_loss(logits, targets, valid, smoothing).backward()
    assert not logits.grad[~valid].any() and logits.grad[valid].any(-1).all()
    other = torch.where(valid, targets, CLASSES - 1 - targets)
    assert torch.equal(
        token_loss(logits, other, valid, smoothing), token_loss(logits, targets, valid, smoothing)
    )


def test_half_precision_logits_give_a_loss_in_fp32(tokens):
    logits, targets, valid = tokens
    half = logits.bfloat16()
    found = token_loss(half, targets, valid)
    assert found.dtype == torch.float32
    assert_close(found, token_loss(half.float(), targets, valid), rtol=0, atol=0)


def test_hits_count_valid_tokens_that_are_right(tokens):
    logits, targets, valid = tokens
    right = logits.argmax(-1)
    assert hits(logits, right, valid) == valid.sum() == 20
    wrong = (right + (torch.arange(9) % 2)) % CLASSES
    assert hits(logits, wrong, valid) == sum((n + 1) // 2 for n in (9, 4, 1, 6))
    assert hits(logits, targets, torch.zeros_like(valid)) == 0


# discriminators


@pytest.fixture
def maps() -> tuple[Maps, Maps]:
    """Real and fake feature maps of two discriminators, with three rows each.

    One map has a second row of much larger values.
    """
    draw = torch.Generator().manual_seed(0)
    shapes: list[list[tuple[int, ...]]]
    shapes = [[(3, 4, 10), (3, 1, 5)], [(3, 2, 6, 3), (3, 4, 2), (3, 1, 7, 2)]]

    def normal() -> Maps:
        return [[torch.randn(s, generator=draw).double() for s in sizes] for sizes in shapes]

    real, fake = normal(), normal()
    real[0][-1][1] *= 30
    return real, fake


def rows_of(maps: Maps, row: int) -> Maps:
    """Returns the maps of one row."""
    return [[x[row : row + 1] for x in part] for part in maps]


def test_least_squares_losses_have_their_formulas(maps):
    real, fake = maps
    d = sum(
        ((1 - r[-1]) ** 2).flatten(1).mean(1) + (f[-1] ** 2).flatten(1).mean(1)
        for r, f in zip(real, fake, strict=True)
    )
    g = sum(((1 - f[-1]) ** 2).flatten(1).mean(1) for f in fake)
    assert_close(discriminator_loss(real, fake), d)
    assert_close(generator_loss(fake), g)


def test_perfect_maps_have_no_loss(maps):
    ones, zeros = (
        [[torch.full_like(x, value) for x in part] for part in maps[0]] for value in (1.0, 0.0)
    )
    assert (
        not discriminator_loss(ones, zeros).any()
        and not generator_loss(ones).any()
        and not feature_loss(ones, ones).any()
    )
    assert_close(discriminator_loss(zeros, ones), torch.full((3,), 4.0, dtype=torch.float64))


def test_feature_matching_has_its_formula(maps):
    real, fake = maps
    wanted = 2 * sum(
        (a - b).abs().flatten(1).mean(1)
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r, f, strict=True)
    )
    assert_close(feature_loss(real, fake), wanted)


def plain_tpr(better: Tensor, worse: Tensor, tau: float) -> Tensor:
    """Returns the TPR loss of one row and one discriminator."""
    difference = (better - worse).flatten()
    median = difference.sort().values[(len(difference) - 1) // 2]
    below = [(d - median) ** 2 for d in difference if d < median]
    mean = sum(below) / len(below) if below else torch.tensor(0.0, dtype=better.dtype)
    return tau - torch.relu(tau - mean)


@pytest.mark.parametrize("tau", [0.04, 1.0, 100.0])
def test_the_tpr_loss_has_its_formula_in_each_row(maps, tau):
    real, fake = maps
    wanted = torch.stack(
        [
            torch.stack(
                [plain_tpr(r[-1][row], f[-1][row], tau) for r, f in zip(real, fake, strict=True)]
            ).sum()
            for row in range(3)
        ]
    )
    assert_close(tpr_loss(real, fake, tau), wanted)


def test_the_tpr_loss_may_go_over_the_batch(maps):
    real, fake = maps
    each = [plain_tpr(r[-1], f[-1], 0.5) for r, f in zip(real, fake, strict=True)]
    wanted = torch.stack(each).sum()
    assert_close(tpr_loss(real, fake, 0.5, "batch"), wanted.expand(3))


def test_no_point_below_the_median_costs_nothing_and_has_a_gradient():
    same = torch.ones(2, 1, 6, requires_grad=True)
    loss = tpr_loss([[same]], [[torch.zeros(2, 1, 6)]])
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert same.grad is not None and same.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss", [discriminator_loss, feature_loss, tpr_loss, lambda real, fake: generator_loss(fake)]
)
def test_a_row_s_loss_does_not_depend_on_the_others(maps, loss):
    together = loss(*maps)
    assert together.shape == (3,)
    for row in range(3):
        assert_close(loss(*(rows_of(side, row) for side in maps)), together[row : row + 1])


@pytest.mark.parametrize(
    "loss", [discriminator_loss, feature_loss, tpr_loss, lambda real, fake: generator_loss(fake)]
)
def test_half_precision_maps_are_averaged_in_fp32(maps, loss):
    half = [[[x.bfloat16() for x in part] for part in side] for side in maps]
    found = loss(*half)
    assert found.dtype == torch.float32
    assert_close(
        found,
        loss(*([[x.float() for x in part] for part in side] for side in half)),
        rtol=0,
        atol=0,
    )


# what an objective yields


def trainable(module: nn.Module) -> Trainable:
    """Returns a trainable that is not updated."""
    return Trainable(module, torch.optim.SGD, lambda update, lr: lr)


def test_a_loss_is_scaled_by_the_units_of_the_whole_step():
    one, two = torch.tensor(6.0, requires_grad=True), torch.tensor(8.0, requires_grad=True)
    loss = Loss(
        mse=(one, "frames", 2.0), ce=(two, "tokens", 0.5), acc=(torch.tensor(3.0), "tokens", 0.0)
    )
    total = loss.scaled({"frames": 4, "tokens": 16})
    assert total == 2 * 6 / 4 + 0.5 * 8 / 16
    total.backward()
    assert one.grad == 0.5 and two.grad == 0.5 / 16


def test_a_metric_that_is_not_finite_does_not_change_the_loss():
    loss = Loss(
        mse=(torch.tensor(1.0), "frames", 1.0), acc=(torch.tensor(float("nan")), "tokens", 0.0)
    )
    assert loss.scaled({"frames": 2, "tokens": 0}) == 0.5


def test_a_detached_loss_is_in_fp64_and_has_no_graph():
    loss = Loss(mse=(torch.tensor(1.0, requires_grad=True) * 2, "frames", 3.0)).detach()
    assert (
        loss["mse"].sum.dtype == torch.float64
        and not loss["mse"].sum.requires_grad
        and loss["mse"][1:] == ("frames", 3.0)
    )


def test_a_frozen_trainable_passes_gradients_on_and_keeps_none():
    module = nn.Linear(2, 1)
    x = torch.ones(1, 2, requires_grad=True)
    with frozen(trainable(module)):
        loss = module(x).sum()
    loss.backward()
    assert x.grad is not None and x.grad.any() and module.weight.grad is None
    assert module.weight.requires_grad and module.bias.requires_grad


def test_freezing_restores_what_was_trained_and_nothing_else():
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(trainable(module)):
        assert not module.weight.requires_grad
        raise RuntimeError
    assert module.weight.requires_grad and not module.bias.requires_grad
