"""A validation metric: how unsure the model is."""

from typing import Any

import torch

from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Loss


class Entropy:
    """Entropy of the predicted distribution, in nats per label."""

    @torch.no_grad()
    def __call__(self, objective: Any, batch: Any) -> Loss:
        """Returns a sum over labels; validation divides by their number."""
        logp_BAV = torch.log_softmax(objective.logits(batch).float(), dim=-1)
        entropy_BA = -(logp_BAV.exp() * logp_BAV).sum(-1)
        valid_BA = valid_mask(batch.label_lens_B, batch.labels_BA.size(1))
        return Loss(entropy=((entropy_BA * valid_BA).sum(), "tokens", 0.0))
