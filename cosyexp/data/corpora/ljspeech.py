"""A corpus in the layout of LJSpeech: `metadata.csv` (id|text|normalized text) and `wavs/`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.arguments import Fraction
from cosyexp.data.corpora.base import Recording, text_lines
from cosyexp.errors import UserError
from cosyexp.registry import register


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class LJSpeech:
    """A corpus in the layout of LJSpeech.

    Attributes:
        name: of the data set.
        root: folder of the corpus.
        held_out: share of the utterances for validation, the last ones.
    """

    name: str
    root: str
    held_out: Fraction

    def _lines(self) -> Iterator[str]:
        path = Path(self.root) / "metadata.csv"
        if not path.is_file():
            raise UserError(
                f"{self.root} is not LJSpeech's folder (it has no metadata.csv): give corpus.root="
            )
        return (line for _, line in text_lines(path, "give corpus.root="))

    def __len__(self) -> int:
        return sum(1 for _ in self._lines())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of `metadata.csv`."""
        total = len(self)
        unseen = max(round(self.held_out * total), 1)
        for i, line in enumerate(self._lines()):
            utt, *texts = line.split("|")
            yield Recording(
                utt=utt,
                text=texts[-1] if texts else "",
                speaker="ljspeech",
                path=str(Path(self.root) / "wavs" / f"{utt}.wav"),
                held_out=i >= total - unseen,
            )
