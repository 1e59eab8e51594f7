"""The corpus protocol: where the recordings of a data set come from.

To read another corpus, write a class as in the other modules of this package, and a YAML in
`conf/corpus/`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Protocol

from cosyexp.errors import UserError
from cosyexp.run.documents import DamagedFileError, open_regular, read_bytes

AUDIO_SIZE = 2**30  # bytes of an audio file


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recording of a corpus.

    Attributes:
        utt: unique id.
        text: what is spoken.
        speaker: name of the speaker.
        path: of the audio file, which is read when it is needed.
        held_out: whether it is for validation instead of training.
        audio: bytes of the audio file, for speech that is not in a file; None: read `path`.
        instruct: instruction that describes how the text is spoken; empty: none.
        fault: why it cannot be used, if the corpus can tell; empty: no fault.
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
        """Returns the bytes of the audio file.

        Raises:
            ValueError: if the file cannot be read.
        """
        if self.audio is not None:
            return self.audio
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ValueError("the audio file is not a regular file")
        try:
            return read_bytes(Path(self.path), AUDIO_SIZE)
        except OSError as error:
            raise ValueError(f"the audio file cannot be read ({error.strerror})") from None
        except DamagedFileError as error:
            raise ValueError(f"the audio file cannot be read ({error.reason})") from None


class Corpus(Protocol):
    """Protocol of corpora; `len` is the number of recordings.

    Recordings are yielded one by one, so that memory does not grow with the audio.
    """

    def __len__(self) -> int: ...

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings, always in the same order."""
        ...


def text_lines(path: Path, hint: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a UTF-8 file that are not blank, with their numbers from 1.

    Bytes that are not UTF-8 become lone surrogates, so that only the utterance that has them is
    faulty.

    Args:
        path: of the file.
        hint: what the error tells the user to do.

    Raises:
        UserError: if there is no such file.
    """
    try:
        with TextIOWrapper(open_regular(path), "utf-8-sig", "surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        raise UserError(f"there is no file {path}: {hint}") from None


def held_out(index: int, total: int, share: float) -> bool:
    """Returns whether an utterance is held out, so that held-out ones are spread evenly.

    Args:
        index: of the utterance, from 0.
        total: number of utterances.
        share: share that is held out; at least one utterance is, unless it is 0.
    """
    chosen = max(round(share * total), 1) if share else 0
    return (index + 1) * chosen // total > index * chosen // total
