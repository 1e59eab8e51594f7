"""Optimizers besides those of torch."""

from collections.abc import Iterable
from typing import Any

import torch

from cosyexp.arguments import Fraction, Positive
from cosyexp.errors import UserError
from cosyexp.registry import register


@register("optimizer")
def adamw_8bit(
    parameters: Iterable[Any],
    *,
    lr: float = 1e-3,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """Makes an AdamW whose moments have 8 bits (Dettmers et al. 2022), a quarter of the memory.

    It is that of bitsandbytes, for engine=ddp on a GPU. Moments of small tensors have 32 bits.

    Raises:
        UserError: bitsandbytes is not installed, or there is no GPU.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise UserError(
            "optimizer=adamw_8bit needs a package that is not installed: pip install "
            "'cosyexp[8bit]'"
        ) from None
    if not torch.cuda.is_available():
        raise UserError("optimizer=adamw_8bit needs a GPU: give optimizer=adamw")
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    return optimizer
