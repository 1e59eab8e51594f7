"""Planted faults: each must make the invariant that watches for it fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from cosyexp.data.draws import Draws
from cosyexp.models.layers.norm import MaskedGroupNorm
from cosyexp.objectives import adversarial
from cosyexp.objectives.losses.adversarial import tpr_loss
from cosyexp.training.engines.common import BaseEngine
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.engines.deepspeed import DeepSpeed
from cosyexp.training.engines.fsdp import FSDP
from cosyexp.training.trainer import Trainer


@contextmanager
def per_rank_mean() -> Iterator[None]:
    """Each rank divides by its own units, then the gradients are averaged: the classic of DDP scripts."""
    totals = Trainer._totals

    def own(self: Trainer, batches: Any) -> dict[str, float]:
        with patch.object(
            self.engine, "sum", lambda values: [value * self.engine.world for value in values]
        ):
            return totals(self, batches)

    with patch.object(Trainer, "_totals", own):
        yield


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Each micro-batch is divided by its own units, then by their number."""
    step = Trainer.step

    def own(self: Trainer, micro_batches: Any) -> None:
        shares = iter(
            [
                {
                    unit: len(micro_batches) * count
                    for unit, count in self.objective.count_units(micro.batch).items()
                }
                for micro in micro_batches
            ]
            * len(self.objective.trainables)
        )
        from cosyexp.objectives.base import Loss

        scaled = Loss.scaled
        with patch.object(Loss, "scaled", lambda loss, _: scaled(loss, next(shares))):
            step(self, micro_batches)

    with patch.object(Trainer, "step", own):
        yield


@contextmanager
def unkeyed_noise() -> Iterator[None]:
    """Rows draw from one stream, in the order in which they come."""
    stream = np.random.default_rng()
    with patch.object(Draws, "__call__", lambda self, utt, purpose: stream):
        yield


@contextmanager
def left_frozen() -> Iterator[None]:
    """The discriminator is frozen for the generator's turn, and never thawed: its own loss then has nothing to differentiate."""

    @contextmanager
    def freeze(trainable: Any) -> Iterator[None]:
        trainable.module.requires_grad_(False)
        yield

    with patch.object(adversarial, "frozen", freeze):
        yield


@contextmanager
def implicit_clip() -> Iterator[None]:
    """An engine that clips to 1.0 where nobody asked it to."""
    build = BaseEngine.__init__

    def clipped(self: BaseEngine, **options: Any) -> None:
        build(
            self,
            **{
                **options,
                "max_grad_norm": 1.0
                if options["max_grad_norm"] is None
                else options["max_grad_norm"],
            },
        )

    with patch.object(BaseEngine, "__init__", clipped):
        yield


@contextmanager
def clip_left_out() -> Iterator[None]:
    """DeepSpeed is not told that there is no clipping, and clips to 1.0 on its own."""
    build = DeepSpeed.__init__

    def unsaid(self: DeepSpeed, **options: Any) -> None:
        build(self, **options)
        del self.config["gradient_clipping"]

    with patch.object(DeepSpeed, "__init__", unsaid):
        yield


@contextmanager
def mean_over_ranks() -> Iterator[None]:
    """Shares of a loss are averaged over the ranks, not summed. Adam does not see it; the norm does."""
    backward = FSDP.backward
    with patch.object(
        FSDP,
        "backward",
        lambda self, name, loss, last: backward(self, name, loss / self.world, last),
    ):
        yield


@contextmanager
def reduced_too_early() -> Iterator[None]:
    """Gradients leave with a step's first micro-batch."""
    backward = DDP.backward
    with patch.object(
        DDP, "backward", lambda self, name, loss, last: backward(self, name, loss, True)
    ):
        yield


@contextmanager
def bare_backward() -> Iterator[None]:
    """ZeRO-3 is not told of a new backward, as no forward goes through DeepSpeed, and takes each for the first of its step."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    with patch.object(DeepSpeedZeroOptimizer_Stage3, "clear_backward_seen_flag", lambda self: None):
        yield


@contextmanager
def unmasked_pad() -> Iterator[None]:
    """Padding counts in the group norms."""
    forward = MaskedGroupNorm.forward
    with patch.object(
        MaskedGroupNorm,
        "forward",
        lambda self, x, mask: forward(self, x, mask.new_ones(mask.shape)),
    ):
        yield


@contextmanager
def padding_is_answer() -> Iterator[None]:
    """Padded positions count in the cross-entropy."""
    from cosyexp.objectives import language

    mask = language.valid_mask
    with patch.object(language, "valid_mask", lambda lengths, size: mask(lengths, size) | True):
        yield


@contextmanager
def batch_median() -> Iterator[None]:
    """The TPR loss takes its median over all segments of the batch."""
    with patch.object(
        adversarial, "tpr_loss", lambda a, b, tau, over: tpr_loss(a, b, tau, "batch")
    ):
        yield
