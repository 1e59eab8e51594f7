"""Kaldi's layout: `wav.scp` (id and path), `text`, `utt2spk`, perhaps `instruct`; a line is an id, white space, and the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording, held_out, text_lines
from cosyexp.errors import UserError

TOLD = "a folder of Kaldi's kind has wav.scp, text and utt2spk; give it as corpus.root="


@dataclass(frozen=True, kw_only=True)
class Kaldi:
    """name: of the data set. root: the folder. held_out: the share of the utterances, spread evenly, kept for validation.

    A relative path in wav.scp is looked for beside it, then from the current folder.
    """

    name: str
    root: str
    held_out: float

    def _pairs(self, name: str) -> Iterator[tuple[str, str]]:
        for _, line in text_lines(Path(self.root) / name, TOLD):
            utt, *rest = line.split(maxsplit=1)
            yield utt, rest[0].strip() if rest else ""

    def _check(self) -> None:
        if (Path(self.root) / "segments").exists():
            raise UserError(
                f"{self.root} has segments, parts of longer recordings: cut the audio into utterances first"
            )
        for utt, path in self._pairs("wav.scp"):
            if path.endswith("|"):
                raise UserError(
                    f"{self.root}/wav.scp has a command instead of a file for {utt}: write the audio to files first"
                )

    def __len__(self) -> int:
        self._check()
        return sum(1 for _ in self._pairs("wav.scp"))

    def recordings(self) -> Iterator[Recording]:
        total = len(self)
        texts, speakers = dict(self._pairs("text")), dict(self._pairs("utt2spk"))
        instruct = dict(self._pairs("instruct")) if (Path(self.root) / "instruct").exists() else {}
        for i, (utt, path) in enumerate(self._pairs("wav.scp")):
            beside = Path(self.root) / path
            yield Recording(
                utt=utt,
                text=texts.get(utt, ""),
                speaker=speakers.get(utt, ""),
                path=str(beside) if beside.exists() else path,
                held_out=held_out(i, total, self.held_out),
                instruct=instruct.get(utt, ""),
                fault="" if utt in texts else f"{self.root}/text has no line for it",
            )
