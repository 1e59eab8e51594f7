"""Focal loss for a speech-token language model (Lin et al. 2017, "Focal loss", eq. 4)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Loss
from cosyexp.objectives.language import Language


class Focal(Language):
    """Cross-entropy in which a label of probability p weighs (1 - p)^gamma.

    Args:
        gamma: 0 is the plain cross-entropy.
    """

    def __init__(
        self, network: nn.Module, *, optimizer: Any, scheduler: Any, gamma: float = 2.0
    ) -> None:
        super().__init__(network, optimizer=optimizer, scheduler=scheduler)
        self.gamma = gamma

    def losses(self, batch: Any) -> Iterator[Loss]:
        """Yields the one loss of the one trainable."""
        yield self.validate(batch)

    def validate(self, batch: Any) -> Loss:
        """Sums over labels; the trainer divides by the tokens of the whole step."""
        logp_BAV = torch.log_softmax(self.logits(batch).float(), dim=-1)
        logp_BA = logp_BAV.gather(-1, batch.labels_BA.unsqueeze(-1)).squeeze(-1)
        valid_BA = valid_mask(batch.label_lens_B, batch.labels_BA.size(1))
        focal = -((1 - logp_BA.exp()) ** self.gamma) * logp_BA
        return Loss(focal=((focal * valid_BA).sum(), "tokens", 1.0))
