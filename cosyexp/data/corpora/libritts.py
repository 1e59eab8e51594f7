"""LibriTTS's layout (Zen et al. 2019): <subset>/<speaker>/<chapter>/<utterance>.wav beside <utterance>.normalized.txt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording
from cosyexp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LibriTTS:
    """name: of the data set. root: the folder of the subsets. train, valid: the subsets that are learned from, and held out."""

    name: str
    root: str
    train: Sequence[str]
    valid: Sequence[str]

    def _files(self) -> Iterator[tuple[bool, Path]]:
        for held_out, subsets in ((False, self.train), (True, self.valid)):
            for subset in subsets:
                folder = Path(self.root) / subset
                if not folder.is_dir():
                    raise UserError(
                        f"{self.root} has no folder {subset}: give corpus.root=, or other corpus.train= or corpus.valid="
                    )
                for speaker in sorted(folder.iterdir()):
                    yield from ((held_out, path) for path in sorted(speaker.glob("*/*.wav")))

    def __len__(self) -> int:
        return sum(1 for _ in self._files())

    def recordings(self) -> Iterator[Recording]:
        for held_out, path in self._files():
            text = path.with_suffix(".normalized.txt")
            yield Recording(
                utt=path.stem,
                text=text.read_text(encoding="utf-8", errors="surrogateescape").strip()
                if text.exists()
                else "",
                speaker=path.parts[-3],
                path=str(path),
                held_out=held_out,
            )
