"""A corpus in the layout of LibriTTS (Zen et al. 2019).

An utterance is <subset>/<speaker>/<chapter>/<utterance>.wav, with its text in
<utterance>.normalized.txt in the same folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording
from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.run.documents import read_bytes


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class LibriTTS:
    """A corpus in the layout of LibriTTS.

    Attributes:
        name: of the data set.
        root: folder of the subsets.
        train: subsets for training.
        valid: subsets for validation.
    """

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
                        f"{self.root} has no folder {subset}: "
                        "correct corpus.root=, corpus.train= or corpus.valid="
                    )
                for speaker in sorted(folder.iterdir()):
                    yield from ((held_out, path) for path in sorted(speaker.glob("*/*.wav")))

    def __len__(self) -> int:
        return sum(1 for _ in self._files())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings by subset and speaker."""
        for held_out, path in self._files():
            file = path.with_suffix(".normalized.txt")
            content = read_bytes(file) if file.exists() else b""
            text = content.decode("utf-8", "surrogateescape")
            yield Recording(
                utt=path.stem,
                text=text.strip(),
                speaker=path.parts[-3],
                path=str(path),
                held_out=held_out,
            )
