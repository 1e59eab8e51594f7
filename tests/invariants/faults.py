"""Planted faults: while one is active, the invariant that it violates must fail."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from cosyexp.data.draws import Draws
from cosyexp.data.loader import MicroBatch
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.models.layers.norm import MaskedGroupNorm
from cosyexp.objectives import adversarial, language
from cosyexp.objectives.base import Loss, Trainable
from cosyexp.objectives.losses.adversarial import tpr_loss
from cosyexp.training.engines.common import BaseEngine
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.engines.deepspeed import DeepSpeed
from cosyexp.training.engines.fsdp import FSDP
from cosyexp.training.trainer import Trainer


@contextmanager
def per_rank_mean() -> Iterator[None]:
    """Divides by the units of a rank and averages gradients over ranks, as many DDP scripts do."""
    step = Trainer.step

    def faulty(self: Trainer, micro_batches: Sequence[MicroBatch]) -> Mapping[str, float]:
        def all_reduce(values: Sequence[float]) -> list[float]:
            return [value * self.engine.world for value in values]

        with patch.object(self.engine, "all_reduce", all_reduce):
            return step(self, micro_batches)

    with patch.object(Trainer, "step", faulty):
        yield


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Divides each micro-batch by its own units, and then by the number of micro-batches."""
    step, scaled = Trainer.step, Loss.scaled

    def faulty(self: Trainer, micro_batches: Sequence[MicroBatch]) -> Mapping[str, float]:
        counts = [self.objective.count_units(micro.batch) for micro in micro_batches]
        shares = [
            {unit: len(counts) * number for unit, number in count.items()} for count in counts
        ]
        calls = iter(shares * len(self.objective.trainables))
        with patch.object(Loss, "scaled", lambda loss, _: scaled(loss, next(calls))):
            return step(self, micro_batches)

    with patch.object(Trainer, "step", faulty):
        yield


@contextmanager
def unkeyed_noise() -> Iterator[None]:
    """Draws the numbers of all rows from one stream, in the order in which the rows come."""
    stream = np.random.default_rng()
    with patch.object(Draws, "__call__", lambda self, utt, purpose: stream):
        yield


@contextmanager
def left_frozen() -> Iterator[None]:
    """Freezes the discriminator for the loss of the generator, and leaves it frozen.

    From the next step on, the loss of the discriminator has no gradient.
    """

    @contextmanager
    def freeze(trainable: Trainable) -> Iterator[None]:
        trainable.module.requires_grad_(False)
        yield

    with patch.object(adversarial, "frozen", freeze):
        yield


@contextmanager
def implicit_clip() -> Iterator[None]:
    """Clips to a norm of 1 if the config does not clip."""
    init = BaseEngine.__init__

    @wraps(init)
    def clipped(self: BaseEngine, *, max_grad_norm: float | None, **options: Any) -> None:
        init(self, max_grad_norm=1.0 if max_grad_norm is None else max_grad_norm, **options)

    with patch.object(BaseEngine, "__init__", clipped):
        yield


@contextmanager
def clip_left_out() -> Iterator[None]:
    """Does not tell DeepSpeed to clip to no norm, so that it clips to 1."""
    init = DeepSpeed.__init__

    @wraps(init)
    def without_key(self: DeepSpeed, **options: Any) -> None:
        init(self, **options)
        del self.config["gradient_clipping"]

    with patch.object(DeepSpeed, "__init__", without_key):
        yield


@contextmanager
def mean_over_ranks() -> Iterator[None]:
    """Averages gradients over ranks instead of adding them, which Adam hides but the norm shows."""
    backward = FSDP.backward

    def faulty(self: FSDP, name: str, loss: Tensor, last: bool = True) -> None:
        backward(self, name, loss / self.world, last)

    with patch.object(FSDP, "backward", faulty):
        yield


@contextmanager
def reduced_too_early() -> Iterator[None]:
    """Sums gradients over ranks at every micro-batch, as if it were the last one of the step."""
    backward = DDP.backward

    def faulty(self: DDP, name: str, loss: Tensor, last: bool = True) -> None:
        backward(self, name, loss, True)

    with patch.object(DDP, "backward", faulty):
        yield


@contextmanager
def bare_backward() -> Iterator[None]:
    """Does not announce a new backward pass to ZeRO-3, which treats each as the first of a step.

    It has no other way to know, as no forward pass goes through the DeepSpeed engine.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    with patch.object(DeepSpeedZeroOptimizer_Stage3, "clear_backward_seen_flag", lambda self: None):
        yield


@contextmanager
def unmasked_padding() -> Iterator[None]:
    """Includes padding in the group norms."""
    forward = MaskedGroupNorm.forward

    def faulty(self: MaskedGroupNorm, x: Tensor, mask: Tensor) -> Tensor:
        return forward(self, x, mask.new_ones(mask.shape))

    with patch.object(MaskedGroupNorm, "forward", faulty):
        yield


@contextmanager
def padding_as_label() -> Iterator[None]:
    """Includes padded positions in the cross-entropy."""

    def faulty(lengths: Tensor, size: int) -> Tensor:
        return valid_mask(lengths, size) | True

    with patch.object(language, "valid_mask", faulty):
        yield


@contextmanager
def batch_median() -> Iterator[None]:
    """Takes the median of the TPR loss over all segments of the batch."""

    def faulty(a: Any, b: Any, tau: float, over: str) -> Tensor:
        return tpr_loss(a, b, tau, "batch")

    with patch.object(adversarial, "tpr_loss", faulty):
        yield
