"""Collator of the language model, which reads text, speech tokens and a speaker embedding.

B batch, L text tokens, N speech tokens, E speaker embedding, T positions, A labels.
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
from cosyexp.registry import register


@dataclass(frozen=True, kw_only=True)
class LanguageBatch(Batch):
    """Batch of the language model, padded with 0; see `SequenceLayout` for the layout of a row.

    Attributes:
        text_BL: tokens of the instruction, if there is one, and of the text.
        text_lens_B: number of these tokens.
        speech_BN: speech tokens.
        speaker_BE: speaker embeddings.
        gather_index_BT: which embedding is at each position.
        lens_B: number of positions.
        label_positions_BA: positions that predict a class.
        labels_BA: the classes to predict.
        label_lens_B: number of labels.
    """

    text_BL: Tensor
    text_lens_B: Tensor
    speech_BN: Tensor
    speaker_BE: Tensor
    gather_index_BT: Tensor
    lens_B: Tensor
    label_positions_BA: Tensor
    labels_BA: Tensor
    label_lens_B: Tensor


@register("collator")
class LanguageCollator:
    """Makes batches of the language model, without reading audio.

    The cost of a row is its number of text and speech tokens plus 3 for the special tokens.

    Args:
        tokenizer: text tokenizer of the family.
        speech_vocabulary: number of different speech tokens.
        speaker_dim: size of a speaker embedding.
        use_spk_embedding: reads the mean embedding of the speaker instead of the utterance's.
        layout: how text and speech are arranged in a sequence.
        instruct: instruction of the rows that have none; None: the model takes no instructions.
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
        """Returns the number of text and speech tokens of each row, plus 3."""
        return 3 + np.sum([sizes[name] for name in self.fields if name != "speaker"], axis=0)

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> LanguageBatch:
        """Lays out the sequence of each row and pads the tensors."""
        blocks = [
            self.in_blocks(utt, row, row["speech"].shape[1], draws)
            for utt, row in zip(utts, rows, strict=True)
        ]
        return LanguageBatch(utts=tuple(utts), **self.tensors(rows, blocks))

    def in_blocks(self, utt: str, row: Row, speech: int, draws: Draws) -> bool:
        """Draws whether text and speech of a row are interleaved in blocks.

        Args:
            utt: id of the utterance, which keys the draw.
            row: fields of the utterance.
            speech: its number of speech tokens.
            draws: the random numbers of the epoch.
        """
        if not self.layout.interleaved:
            return False
        return self.layout.in_blocks(
            row["text"].shape[1], speech, float(draws(utt, "layout").random())
        )

    def tensors(self, rows: Sequence[Row], blocks: Sequence[bool]) -> dict[str, Tensor]:
        """Returns the tensors of a `LanguageBatch`, by name.

        Args:
            rows: fields of the utterances.
            blocks: whether each row is interleaved in blocks.
        """
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
        gather_index, label_positions, labels = zip(*sequences, strict=True)
        return {
            "text_BL": pad(text).long(),
            "text_lens_B": lengths(text),
            "speech_BN": pad(speech).long(),
            "speaker_BE": torch.from_numpy(np.stack([row["speaker"][:, 0] for row in rows])),
            "gather_index_BT": pad(gather_index),
            "lens_B": lengths(gather_index),
            "label_positions_BA": pad(label_positions),
            "labels_BA": pad(labels),
            "label_lens_B": lengths(label_positions),
        }
