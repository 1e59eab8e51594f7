"""Supervised training of a speech-token language model.

B batch, L text tokens, N speech tokens, E speaker embedding, T input positions, A labels, V
classes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from cosyexp.arguments import Fraction
from cosyexp.data.collators.llm import LanguageBatch
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable
from cosyexp.objectives.losses.cross_entropy import hits, token_loss
from cosyexp.registry import register


@register("objective")
class Language:
    """Cross-entropy of the speech tokens and of the special tokens that end them, equally weighted.

    Args:
        network: the language model.
        optimizer: makes the optimizer, see `Trainable`.
        scheduler: the learning-rate schedule, see `Trainable`.
        smoothing: share of the probability that label smoothing moves from the target to the other
            classes.
    """

    frozen_modules = ()
    units = ("tokens",)

    def __init__(
        self, network: nn.Module, *, optimizer: Any, scheduler: Any, smoothing: Fraction = 0.0
    ) -> None:
        self.network, self.smoothing = network, smoothing
        self.trainables: Mapping[str, Trainable] = {"llm": Trainable(network, optimizer, scheduler)}

    def count_units(self, batch: LanguageBatch) -> dict[str, int]:
        """Counts the labels of all rows."""
        return {"tokens": int(batch.label_lens_B.sum())}

    def losses(self, batch: LanguageBatch) -> Iterator[Loss]:
        """Yields the loss of the language model."""
        yield self._loss(batch)

    def validate(self, batch: LanguageBatch) -> Loss:
        """Returns the loss, as in training."""
        return self._loss(batch)

    def preview(self, batch: LanguageBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        """Yields nothing, as speech tokens alone can be neither shown nor played."""
        return iter(())

    def logits(self, batch: LanguageBatch) -> Tensor:
        """Returns the logits at the label positions, (B, A, V)."""
        logits_BAV: Tensor = self.trainables["llm"](
            batch.text_BL,
            batch.text_lens_B,
            batch.speech_BN,
            batch.speaker_BE,
            batch.gather_index_BT,
            batch.lens_B,
            batch.label_positions_BA,
        )
        return logits_BAV

    def _loss(self, batch: LanguageBatch) -> Loss:
        logits_BAV = self.logits(batch)
        valid_BA = valid_mask(batch.label_lens_B, batch.labels_BA.size(1))
        return Loss(
            ce=(token_loss(logits_BAV, batch.labels_BA, valid_BA, self.smoothing), "tokens", 1.0),
            acc=(hits(logits_BAV, batch.labels_BA, valid_BA), "tokens", 0.0),
        )
