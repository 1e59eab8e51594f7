"""What a speech-token language model reads: text, speech tokens, a speaker embedding. It never opens audio.

B batch, L text tokens, N speech tokens, E speaker embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.batch import Batch, lengths, pad
from cosyexp.data.draws import Draws
from cosyexp.data.fields import Field, SpeakerEmbedding, SpeechTokens, TextTokens
from cosyexp.data.tokenizers import Characters
from cosyexp.data.views.base import Row


@dataclass(frozen=True, kw_only=True)
class LanguageBatch(Batch):
    """Ids are padded with 0."""

    text_BL: Tensor
    text_lens_B: Tensor
    speech_BN: Tensor
    speech_lens_B: Tensor
    speaker_BE: Tensor


class LanguageView:
    """One row costs its text and speech tokens, and the three marks between them."""

    def __init__(self, *, tokenizer: Characters, speech_vocabulary: int, speaker_dim: int, use_spk_embedding: bool) -> None:
        self.fields: Mapping[str, Field] = {
            "text": TextTokens(tokenizer),
            "speech": SpeechTokens(speech_vocabulary),
            "speaker": SpeakerEmbedding("spk_embedding" if use_spk_embedding else "utt_embedding", speaker_dim),
        }

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        return sizes["text"] + sizes["speech"] + 3

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> LanguageBatch:
        text, speech = [row["text"][0] for row in rows], [row["speech"][0] for row in rows]
        return LanguageBatch(
            utts=tuple(utts),
            text_BL=pad(text).long(),
            text_lens_B=lengths(text),
            speech_BN=pad(speech).long(),
            speech_lens_B=lengths(speech),
            speaker_BE=torch.from_numpy(np.stack([row["speaker"][:, 0] for row in rows])),
        )
