"""Where recordings come from. To read another corpus, write a class like those beside this file, and a YAML in `conf/corpus/`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cosyexp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recording:
    """path: of the audio file, which is read when its turn comes. audio: its bytes, for speech that is in no file.

    held_out: for validation, never for training. instruct: how it is asked to sound. fault: why it cannot be used, where the corpus knows.
    """

    utt: str
    text: str
    speaker: str
    path: str
    held_out: bool
    audio: bytes | None = None
    instruct: str = ""
    fault: str = ""

    def read(self) -> bytes:
        """The bytes of the audio file; ValueError where there are none."""
        if self.audio is not None:
            return self.audio
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"its audio file cannot be read ({error.strerror})") from None


class Corpus(Protocol):
    """`recordings` are listed, not held: memory does not grow with the corpus, beyond what its own index takes."""

    def __len__(self) -> int: ...

    def recordings(self) -> Iterator[Recording]: ...


def text_lines(path: Path, told: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers; `told` says what to do where there is no such file.

    Bytes that are no UTF-8 come as lone surrogates: what they are part of is a fault of that utterance alone.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"there is no file {path}: {told}") from None


def held_out(index: int, total: int, share: float) -> bool:
    """Spreads the held-out utterances evenly over a corpus, at least one of them unless `share` is 0."""
    chosen = max(round(share * total), 1) if share else 0
    return (index + 1) * chosen // total > index * chosen // total
