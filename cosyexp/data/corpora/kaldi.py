"""A corpus in Kaldi's layout: a folder with `wav.scp`, `text`, `utt2spk` and optionally `instruct`.

A line of each file is an utterance id, white space, and a value: in `wav.scp` an audio path.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.arguments import Fraction
from cosyexp.data.corpora.base import Recording, held_out, text_lines
from cosyexp.errors import UserError
from cosyexp.registry import register

HINT = "give a folder with wav.scp, text and utt2spk as corpus.root="


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Kaldi:
    """A corpus in Kaldi's layout.

    A relative path in `wav.scp` is looked up in its folder, then in the current folder.

    Attributes:
        name: of the data set.
        root: the folder.
        held_out: share of the utterances for validation, spread evenly.
    """

    name: str
    root: str
    held_out: Fraction

    def _pairs(self, name: str) -> Iterator[tuple[str, str]]:
        for _, line in text_lines(Path(self.root) / name, HINT):
            utt, *rest = line.split(maxsplit=1)
            yield utt, rest[0].strip() if rest else ""

    def _check(self) -> None:
        if (Path(self.root) / "segments").exists():
            raise UserError(
                f"{self.root}/segments divides longer recordings into utterances: "
                "write each utterance to a file first"
            )
        for utt, path in self._pairs("wav.scp"):
            if path.endswith("|"):
                raise UserError(
                    f"{self.root}/wav.scp has a command instead of a file for {utt}: "
                    "write the audio to files first"
                )

    def __len__(self) -> int:
        self._check()
        return sum(1 for _ in self._pairs("wav.scp"))

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of `wav.scp`."""
        total = len(self)
        texts, speakers = dict(self._pairs("text")), dict(self._pairs("utt2spk"))
        instruct = dict(self._pairs("instruct")) if (Path(self.root) / "instruct").exists() else {}
        for i, (utt, path) in enumerate(self._pairs("wav.scp")):
            in_folder = Path(self.root) / path
            yield Recording(
                utt=utt,
                text=texts.get(utt, ""),
                speaker=speakers.get(utt, ""),
                path=str(in_folder) if os.path.exists(in_folder) else path,
                held_out=held_out(i, total, self.held_out),
                instruct=instruct.get(utt, ""),
                fault="" if utt in texts else f"{self.root}/text has no line for it",
            )
