"""Collator of preference pairs: a text with a chosen and a rejected sequence of speech tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.collators.base import Row
from cosyexp.data.collators.llm import LanguageBatch, LanguageCollator
from cosyexp.data.draws import Draws
from cosyexp.data.fields import RejectedTokens
from cosyexp.data.layout import Layout
from cosyexp.data.tokenizers import Tokenizer
from cosyexp.registry import register

FIXED = -2  # the "epoch" of random numbers that are the same in all epochs


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(LanguageBatch):
    """Batch of P pairs, as the rows [chosen_1..P, rejected_1..P]; `utts` has the P ids.

    Attributes:
        reference_B: cached log-probability of each row under the reference model, or 0.
    """

    reference_B: Tensor


@register("collator")
class PreferenceCollator(LanguageCollator):
    """Makes batches of preference pairs; the cost of a pair is that of both rows.

    The chosen and the rejected row have the same layout, interleaved only if both are long enough.

    Args:
        tokenizer: text tokenizer of the family.
        speech_vocabulary: number of different speech tokens.
        speaker_dim: size of a speaker embedding.
        use_spk_embedding: reads the mean embedding of the speaker instead of the utterance's.
        layout: how text and speech are arranged in a sequence.
        instruct: instruction of the rows that have none; None: the model takes no instructions.
        keep_layout: draws one layout of a pair for all epochs, which a cached reference requires.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        speech_vocabulary: int,
        speaker_dim: int,
        use_spk_embedding: bool,
        layout: Layout,
        instruct: str | None = None,
        keep_layout: bool = False,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            speech_vocabulary=speech_vocabulary,
            speaker_dim=speaker_dim,
            use_spk_embedding=use_spk_embedding,
            layout=layout,
            instruct=instruct,
        )
        self.keep_layout = keep_layout
        self.fields = {**self.fields, "rejected": RejectedTokens(speech_vocabulary)}

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns twice the number of tokens of the longer row of each pair."""
        speech = np.maximum(sizes["speech"], sizes["rejected"])
        return 2 * super().length({**sizes, "speech": speech, "rejected": np.zeros_like(speech)})

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> PreferenceBatch:
        """Lays out both rows of each pair and adds their cached reference log-probabilities."""
        layouts = Draws(draws.seed, FIXED) if self.keep_layout else draws
        shorter = [min(row["speech"].shape[1], row["rejected"].shape[1]) for row in rows]
        blocks = [
            self.in_blocks(utt, row, size, layouts)
            for utt, row, size in zip(utts, rows, shorter, strict=True)
        ]
        both = [*rows, *({**row, "speech": row["rejected"]} for row in rows)]
        known_P2 = np.stack([row.get("reference", np.zeros(2, np.float32)) for row in rows])
        return PreferenceBatch(
            utts=tuple(utts),
            reference_B=torch.from_numpy(known_P2.T.flatten()),
            **self.tensors(both, 2 * blocks),
        )
