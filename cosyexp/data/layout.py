"""The layout of a language model's sequence: where its tokens are, and what it predicts.

L text tokens, N speech tokens, T positions, A labels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cosyexp.arguments import Count, Share
from cosyexp.registry import register


class SequenceLayout(NamedTuple):
    """The layout of one row.

    Attributes:
        gather_index_T: which embedding is at each position, as an index into [text_1..L,
            speech_1..N, sos, task, speaker].
        label_positions_A: positions that predict a class.
        labels_A: the classes to predict.
    """

    gather_index_T: np.ndarray
    label_positions_A: np.ndarray
    labels_A: np.ndarray


@register("layout")
@dataclass(frozen=True, kw_only=True)
class Layout:
    """Arranges a row as [sos, (speaker), instruction, text, task, speech], or interleaved.

    An interleaved row alternates blocks of text and speech tokens, so that synthesis can start
    before the whole text is known (Du et al. 2024, "CosyVoice 2", section 2.3).

    Attributes:
        speaker: whether the sequence has a speaker embedding.
        vocabulary: number of different speech tokens.
        eos: class that ends the speech, counted from the end of the vocabulary.
        fill_token: class that ends a block of speech, counted from the end of the vocabulary; None:
            the model has none.
        interleaved: share of interleaved rows, among those with enough speech.
        block: text and speech tokens of a block.
    """

    speaker: bool
    vocabulary: int
    eos: Count = 0
    fill_token: Count | None = None
    interleaved: Share = 0.0
    block: tuple[int, int] = (5, 15)

    def in_blocks(self, texts: int, speeches: int, coin: float) -> bool:
        """Returns whether a row is interleaved in blocks.

        Args:
            texts: number of text tokens, without the instruction.
            speeches: number of speech tokens.
            coin: random number in [0, 1).
        """
        return coin < self.interleaved and speeches * self.block[0] > texts * self.block[1]

    def __call__(
        self, text: int, speech_N: np.ndarray, lead: int, blocks: bool, size: tuple[int, int]
    ) -> SequenceLayout:
        """Returns the layout of a row.

        Args:
            text: number of text tokens, with the instruction.
            speech_N: speech tokens.
            lead: how many of the text tokens are the instruction.
            blocks: whether the row is interleaved.
            size: L and N of the batch, with padding.
        """
        texts, speeches = np.arange(text), size[0] + np.arange(len(speech_N))
        sos, task, speaker = sum(size) + np.arange(3)
        pieces: list[Any] = [[sos], [speaker] if self.speaker else [], texts[:lead]]
        label_positions: list[Any] = []
        labels: list[Any] = []
        position = lead + 1 + self.speaker
        texts = texts[lead:]
        if blocks:
            assert self.fill_token is not None, "an interleaved layout needs a fill token"
            text_block, speech_block = self.block
            while len(texts) >= text_block:
                pieces += [texts[:text_block], speeches[:speech_block]]
                label_positions.append(position + text_block - 1 + np.arange(speech_block + 1))
                labels += [speech_N[:speech_block], [self.vocabulary + self.fill_token]]
                texts = texts[text_block:]
                speeches, speech_N = speeches[speech_block:], speech_N[speech_block:]
                position += text_block + speech_block
        pieces += [texts, [task], speeches]
        label_positions.append(position + len(texts) + np.arange(len(speech_N) + 1))
        labels += [speech_N, [self.vocabulary + self.eos]]
        return SequenceLayout(
            *(np.concatenate(parts).astype(np.int64) for parts in (pieces, label_positions, labels))
        )
