"""A corpus in the layout of AISHELL-3 (Shi et al. 2020).

`train/content.txt` has lines of `SSB00050001.wav`, white space, and characters with their pinyin in
turn; the audio is `train/wav/SSB0005/SSB00050001.wav`. `test/` is laid out in the same way.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording, text_lines
from cosyexp.registry import register

SPLITS = {"train": False, "test": True}
PINYIN = re.compile("[a-zA-Z:ü]+[0-9]")


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Aishell3:
    """A corpus in the layout of AISHELL-3, whose test set is held out for validation.

    Attributes:
        name: of the data set.
        root: the folder of `train` and `test`.
    """

    name: str
    root: str

    def _lines(self) -> Iterator[tuple[bool, Path, str]]:
        for split, held_out in SPLITS.items():
            folder = Path(self.root).expanduser() / split
            if split == "train" or folder.exists():
                for _, line in text_lines(folder / "content.txt", "give corpus.root="):
                    yield held_out, folder, line

    def __str__(self) -> str:
        return f"AISHELL-3's layout: content.txt of {self.root}/train and test"

    def __len__(self) -> int:
        return sum(1 for _ in self._lines())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of `content.txt`."""
        for held_out, folder, line in self._lines():
            file, *words = line.split()
            pinyin = all(PINYIN.fullmatch(word) for word in words[1::2]) and len(words) % 2 == 0
            utt = Path(file).stem
            yield Recording(
                utt=utt,
                text="".join(words[::2]),
                speaker=utt[:7],
                path=str(folder / "wav" / utt[:7] / file),
                held_out=held_out,
                fault="" if pinyin else "its line does not have a character and its pinyin in turn",
            )
