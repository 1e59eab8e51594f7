"""A folder of recordings with a text file beside each: <root>/<speaker>/<name>.wav and .txt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording


@dataclass(frozen=True, kw_only=True)
class TextBeside:
    """One speaker per folder; every n-th utterance is held out for validation.

    Args:
        name: of the data set.
        root: the folder of the speakers.
        held_out_every: n.
    """

    name: str
    root: str
    held_out_every: int = 10

    def _paths(self) -> list[Path]:
        return sorted(Path(self.root).glob("*/*.wav"))

    def __len__(self) -> int:
        return len(self._paths())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in order of their paths."""
        for i, path in enumerate(self._paths()):
            text = path.with_suffix(".txt")
            yield Recording(
                utt=f"{path.parent.name}-{path.stem}",
                text=text.read_text(encoding="utf-8").strip() if text.exists() else "",
                speaker=path.parent.name,
                path=str(path),
                held_out=i % self.held_out_every == 0,
            )
