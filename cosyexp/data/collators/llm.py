"""What a speech-token language model reads: text, speech tokens, a speaker embedding. It never opens audio.

B batch, L text tokens, N speech tokens, E speaker embedding, T positions, A answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosyexp.data.batch import Batch, lengths, pad
from cosyexp.data.collators.base import Row
from cosyexp.data.draws import Draws
from cosyexp.data.fields import Field, InstructTokens, SpeakerEmbedding, SpeechTokens, TextTokens
from cosyexp.data.layout import Layout
from cosyexp.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LanguageBatch(Batch):
    """text_BL: an instruction, if there is one, and the text. gather_index_BT, label_positions_BA, labels_BA: see `Layout`. Padded with 0."""

    text_BL: Tensor
    text_lens_B: Tensor
    speech_BN: Tensor
    speaker_BE: Tensor
    gather_index_BT: Tensor
    lens_B: Tensor
    label_positions_BA: Tensor
    labels_BA: Tensor
    label_lens_B: Tensor


class LanguageCollator:
    """One row costs its text and speech tokens, and the three marks between them.

    instruct: what stands before the text of a row that brings no instruction of its own; None: the model knows none.
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
    ) -> None:
        self.layout = layout
        self.fields: Mapping[str, Field] = {
            "text": TextTokens(tokenizer),
            "speech": SpeechTokens(speech_vocabulary),
            "speaker": SpeakerEmbedding(
                "spk_embedding" if use_spk_embedding else "utt_embedding", speaker_dim
            ),
        }
        if instruct is not None:
            self.fields = {**self.fields, "instruct": InstructTokens(tokenizer, instruct)}

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        return 3 + np.sum([sizes[name] for name in self.fields if name != "speaker"], axis=0)

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> LanguageBatch:
        blocks = [
            self.in_blocks(utt, row, row["speech"].shape[1], draws)
            for utt, row in zip(utts, rows, strict=True)
        ]
        return LanguageBatch(utts=tuple(utts), **self.tensors(rows, blocks))

    def in_blocks(self, utt: str, row: Row, speech: int, draws: Draws) -> bool:
        """Whether a row with so many speech tokens is laid out in blocks."""
        if not self.layout.interleaved:
            return False
        return self.layout.in_blocks(
            row["text"].shape[1], speech, float(draws(utt, "layout").random())
        )

    def tensors(self, rows: Sequence[Row], blocks: Sequence[bool]) -> dict[str, Tensor]:
        leads = [row["instruct"].shape[1] if "instruct" in row else 0 for row in rows]
        text = [
            np.concatenate([row[name][0] for name in ("instruct", "text") if name in row])
            for row in rows
        ]
        speech = [row["speech"][0] for row in rows]
        size = max(map(len, text)), max(map(len, speech))
        sequences = [
            self.layout(len(t), s, lead, b, size)
            for t, s, lead, b in zip(text, speech, leads, blocks, strict=True)
        ]
        order, answer, target = zip(*sequences, strict=True)
        return {
            "text_BL": pad(text).long(),
            "text_lens_B": lengths(text),
            "speech_BN": pad(speech).long(),
            "speaker_BE": torch.from_numpy(np.stack([row["speaker"][:, 0] for row in rows])),
            "gather_index_BT": pad(order),
            "lens_B": lengths(order),
            "label_positions_BA": pad(answer),
            "labels_BA": pad(target),
            "label_lens_B": lengths(answer),
        }
