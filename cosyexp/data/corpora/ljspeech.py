"""LJSpeech's layout: `metadata.csv` (id|text|normalised text) beside `wavs/`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording
from cosyexp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LJSpeech:
    """name: of the data set. root: the data set's folder. held_out: the share of the utterances, its last ones, kept for validation."""

    name: str
    root: str
    held_out: float

    def _lines(self) -> list[list[str]]:
        try:
            text = (Path(self.root) / "metadata.csv").read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{self.root} is not LJSpeech's folder (it has no metadata.csv): give corpus.root=") from None
        return [line.split("|") for line in text.splitlines() if line.strip()]

    def __len__(self) -> int:
        return len(self._lines())

    def recordings(self) -> Iterator[Recording]:
        lines = self._lines()
        unseen = max(round(self.held_out * len(lines)), 1)
        for i, (utt, *texts) in enumerate(lines):
            path = Path(self.root) / "wavs" / f"{utt}.wav"
            yield Recording(
                utt=utt,
                text=texts[-1] if texts else "",
                speaker="ljspeech",
                audio=path.read_bytes() if path.exists() else b"",
                path=str(path),
                held_out=i >= len(lines) - unseen,
            )
