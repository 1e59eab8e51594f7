"""Validation metrics, which are measured in addition to the losses.

To add a metric, write a class as those here, and a YAML in `conf/metrics/`.
"""

from typing import Any

import torch

from cosyexp.errors import UserError
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Loss, Objective
from cosyexp.registry import register


@register("metric")
class TopKAccuracy:
    """How often the true class is among the k most likely, for objectives with `logits(batch)`.

    Args:
        k: number of classes.

    Raises:
        ValueError: k is not positive.
    """

    def __init__(self, *, k: int = 5) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be >= 1")
        self.k = k

    @torch.no_grad()
    def __call__(self, objective: Objective, batch: Any) -> Loss:
        """Counts the hits of a batch, as the term `top<k>`.

        Raises:
            UserError: the objective has no logits.
        """
        if not hasattr(objective, "logits"):
            raise UserError(f"metrics=top{self.k} needs an llm trained with mode=sft")
        logits_BAV = objective.logits(batch)
        valid_BA = valid_mask(batch.label_lens_B, batch.labels_BA.size(1))
        likeliest = logits_BAV.topk(min(self.k, logits_BAV.size(-1)), dim=-1).indices
        hits = (likeliest == batch.labels_BA.unsqueeze(-1)).any(-1) & valid_BA
        return Loss(**{f"top{self.k}": (hits.sum(), "tokens", 0.0)})
