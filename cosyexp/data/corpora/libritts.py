"""A corpus in the layout of LibriTTS (Zen et al. 2019).

An utterance is <subset>/<speaker>/<chapter>/<utterance>.wav, with its text in
<utterance>.normalized.txt in the same folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording, SplitCorpus, text_of
from cosyexp.errors import UserError
from cosyexp.registry import register


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class LibriTTS(SplitCorpus):
    """A corpus in the layout of LibriTTS.

    Attributes:
        root: folder of the subsets.
        train: subsets for training.
        valid: subsets for validation; none: a split is made.
    """

    root: str
    train: Sequence[str]
    valid: Sequence[str] = ()

    def _files(self) -> Iterator[tuple[bool, Path]]:
        for held_out, subsets in ((False, self.train), (True, self.valid)):
            for subset in subsets:
                folder = Path(self.root).expanduser() / subset
                if not folder.is_dir():
                    raise UserError(
                        f"{self.root} has no folder {subset}: "
                        "correct corpus.root=, corpus.train= or corpus.valid="
                    )
                for speaker in sorted(folder.iterdir()):
                    yield from ((held_out, path) for path in sorted(speaker.glob("*/*.wav")))

    def __str__(self) -> str:
        valid = f", validation in {', '.join(self.valid)}" if self.valid else ""
        return f"LibriTTS's layout: {', '.join(self.train)}{valid}"

    def __len__(self) -> int:
        return sum(1 for _ in self._files())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings by subset and speaker."""
        for held_out, path in self._files():
            yield Recording(
                utt=path.stem,
                text=text_of(path.with_suffix(".normalized.txt")),
                speaker=path.parts[-3],
                path=str(path),
                held_out=held_out if self.valid else None,
            )
