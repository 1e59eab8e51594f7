"""What preference training of a language model reads: a text, a chosen and a rejected answer, a speaker embedding."""

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

KEPT = -2  # the "epoch" of draws that are the same in all epochs


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(LanguageBatch):
    """Rows [chosen_1..P, rejected_1..P] of P pairs; `utts` names the pairs.

    reference_B: the log-probability that the reference gives each row, where it is cached; else 0.
    """

    reference_B: Tensor


class PreferenceCollator(LanguageCollator):
    """One pair costs both of its rows. Chosen and rejected answer have one layout: in blocks only if both are long enough.

    keep_layout: a pair has the same layout in all epochs, as its cached reference needs.
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
        speech = np.maximum(sizes["speech"], sizes["rejected"])
        return 2 * super().length({**sizes, "speech": speech, "rejected": np.zeros_like(speech)})

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> PreferenceBatch:
        layouts = Draws(draws.seed, KEPT) if self.keep_layout else draws
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
