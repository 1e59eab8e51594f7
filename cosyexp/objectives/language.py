"""Supervised training of a speech-token language model."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from cosyexp.data.collators.llm import LanguageBatch
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable
from cosyexp.objectives.losses.cross_entropy import hits, token_loss


class Language:
    """Cross-entropy of the answers: speech tokens and the marks that end them; every one weighs the same.

    smoothing: share of probability that label smoothing takes from the target.
    """

    frozen_modules = ()
    units = ("tokens",)

    def __init__(
        self, network: nn.Module, *, optimizer: Any, scheduler: Any, smoothing: float = 0.0
    ) -> None:
        self.network, self.smoothing = network, smoothing
        self.trainables: Mapping[str, Trainable] = {"llm": Trainable(network, optimizer, scheduler)}

    def count_units(self, batch: LanguageBatch) -> dict[str, int]:
        return {"tokens": int(batch.label_lens_B.sum())}

    def losses(self, batch: LanguageBatch) -> Iterator[Loss]:
        yield self._loss(batch)

    def validate(self, batch: LanguageBatch) -> Loss:
        return self._loss(batch)

    def preview(self, batch: LanguageBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        return iter(())

    def _loss(self, batch: LanguageBatch) -> Loss:
        logits = self.trainables["llm"](
            batch.text_BL,
            batch.text_lens_B,
            batch.speech_BN,
            batch.speaker_BE,
            batch.gather_index_BT,
            batch.lens_B,
            batch.label_positions_BA,
        )
        valid = valid_mask(batch.label_lens_B, batch.labels_BA.size(1))
        return Loss(
            ce=(token_loss(logits, batch.labels_BA, valid, self.smoothing), "tokens", 1.0),
            acc=(hits(logits, batch.labels_BA, valid), "tokens", 0.0),
        )
