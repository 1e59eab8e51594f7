"""Supervised training of a speech-token language model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cosyexp.data.views.llm import LanguageBatch
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Loss, Picture, Player, Sound
from cosyexp.objectives.losses.cross_entropy import hits, token_loss


class Language:
    """Cross-entropy of the answer's tokens and its end; every token weighs the same.

    smoothing: share of probability that label smoothing takes from the target.
    """

    helpers = ()
    units = ("tokens",)

    def __init__(self, network: nn.Module, *, optimizer: Any, scheduler: Any, smoothing: float = 0.0) -> None:
        self.network, self.smoothing = network, smoothing
        self.players: Mapping[str, Player] = {"llm": Player(network, optimizer, scheduler)}

    def weights(self, batch: LanguageBatch) -> dict[str, int]:
        return {"tokens": int(batch.speech_lens_B.sum()) + len(batch)}

    def turns(self, batch: LanguageBatch) -> Iterator[Loss]:
        yield self._loss(batch)

    def validate(self, batch: LanguageBatch) -> Loss:
        return self._loss(batch)

    def preview(self, batch: LanguageBatch) -> Iterator[tuple[str, Picture | Sound]]:
        return iter(())

    def _loss(self, batch: LanguageBatch) -> Loss:
        logits = self.players["llm"](batch.text_BL, batch.text_lens_B, batch.speech_BN, batch.speech_lens_B, batch.speaker_BE)
        end = torch.full_like(batch.speech_lens_B, logits.size(-1) - 1).unsqueeze(1)
        targets = torch.cat([batch.speech_BN, end], dim=1).scatter(1, batch.speech_lens_B.unsqueeze(1), end)
        valid = valid_mask(batch.speech_lens_B + 1, targets.size(1))
        return Loss(
            ce=(token_loss(logits, targets, valid, self.smoothing), "tokens", 1.0),
            acc=(hits(logits, targets, valid), "tokens", 0.0),
        )
