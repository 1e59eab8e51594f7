"""How the text and the speech tokens of an utterance stand in one sequence, and what each position is to predict.

L text tokens, N speech tokens, T positions, A answers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class SequenceLayout(NamedTuple):
    """One row. gather_index_T: which of the pool [text_1..L, speech_1..N, start, task, speaker] stands at each position.

    label_positions_A: the positions that predict a class. labels_A: the classes that they are to predict.
    """

    gather_index_T: np.ndarray
    label_positions_A: np.ndarray
    labels_A: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Layout:
    """[start, (speaker), instruction, text, task, speech]; or, interleaved, blocks of text and speech.

    (Du et al. 2024, "CosyVoice 2", section 2.3.)


    speaker: whether a speaker embedding has a place of its own.
    vocabulary: of speech tokens. eos, fill_token: the marks that end the speech, and a block of it: places behind the vocabulary.
    interleaved: the share of rows in blocks, among those with speech enough for them.
    block: text and speech tokens of a block.
    """

    speaker: bool
    vocabulary: int
    eos: int = 0
    fill_token: int | None = None
    interleaved: float = 0.0
    block: tuple[int, int] = (5, 15)

    def in_blocks(self, texts: int, speeches: int, coin: float) -> bool:
        """Whether a row of so many tokens, the instruction left out, is interleaved; coin in [0, 1)."""
        return coin < self.interleaved and speeches * self.block[0] > texts * self.block[1]

    def __call__(
        self, text: int, speech_N: np.ndarray, lead: int, blocks: bool, size: tuple[int, int]
    ) -> SequenceLayout:
        """text: its tokens, of which `lead` are an instruction. size: L and N of the batch, with padding."""
        texts, speeches = np.arange(text), size[0] + np.arange(len(speech_N))
        start, task, speaker = sum(size) + np.arange(3)
        pieces: list[Any] = [[start], [speaker] if self.speaker else [], texts[:lead]]
        answers: list[Any] = []
        targets: list[Any] = []
        place = lead + 1 + self.speaker
        texts = texts[lead:]
        if blocks:
            assert self.fill_token is not None, "a layout in blocks has a class that ends them"
            wide, long = self.block
            while len(texts) >= wide:
                pieces += [texts[:wide], speeches[:long]]
                answers.append(place + wide - 1 + np.arange(long + 1))
                targets += [speech_N[:long], [self.vocabulary + self.fill_token]]
                texts, speeches, speech_N, place = (
                    texts[wide:],
                    speeches[long:],
                    speech_N[long:],
                    place + wide + long,
                )
        pieces += [texts, [task], speeches]
        answers.append(place + len(texts) + np.arange(len(speech_N) + 1))
        targets += [speech_N, [self.vocabulary + self.eos]]
        return SequenceLayout(
            *(np.concatenate(parts).astype(np.int64) for parts in (pieces, answers, targets))
        )
