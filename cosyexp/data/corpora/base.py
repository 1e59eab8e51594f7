"""The corpus protocol: where the recordings of a data set come from.

To read another corpus, write a class as in the other modules of this package, and a YAML in
`conf/corpus/`.
"""

import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from gzip import GzipFile
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from unicodedata import normalize

from cosyexp.arguments import Fraction
from cosyexp.data.audio import cut
from cosyexp.data.corpora.columns import Key
from cosyexp.data.splits import Split
from cosyexp.errors import UserError
from cosyexp.run.documents import SIZE, DamagedFileError, open_regular, read_bytes

AUDIO_SIZE = 2**30  # bytes of an audio file


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recording of a corpus; its strings are in Unicode's composed form, NFC.

    Attributes:
        utt: unique id.
        text: what is spoken.
        speaker: name of the speaker.
        path: of the file with the audio, which is read when it is needed.
        held_out: whether it is for validation instead of training; None: the split decides.
        audio: bytes of the audio file, for speech that is not in a file; None: read `path`.
        place: offset and size in bytes of the audio file within `path`; None: all of it.
        start: where the recording begins in the audio, in seconds.
        end: where it ends, in seconds; None: at the end of the audio.
        instruct: instruction that describes how the text is spoken; empty: none.
        fault: why it cannot be used, if the corpus can tell; empty: no fault.
    """

    utt: str
    text: str
    speaker: str
    path: str
    held_out: bool | None = None
    audio: bytes | None = None
    place: tuple[int, int] | None = None
    start: float = 0.0
    end: float | None = None
    instruct: str = ""
    fault: str = ""

    def __post_init__(self) -> None:
        for name in ("utt", "text", "speaker", "instruct"):
            object.__setattr__(self, name, normalize("NFC", getattr(self, name)))

    @property
    def is_file(self) -> bool:
        """Whether the recording is the whole of the file `path`."""
        return self.audio is None and self.place is None and not self.start and self.end is None

    def open(self) -> BinaryIO:
        """Opens the audio file, of which the recording may be a part.

        Raises:
            ValueError: if the file cannot be read.
        """
        if self.audio is not None:
            return io.BytesIO(self.audio)
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ValueError("the audio file is not a regular file")
        try:
            file = open_regular(Path(self.path))
        except OSError as error:
            raise ValueError(f"the audio file cannot be read ({error.strerror})") from None
        except DamagedFileError as error:
            raise ValueError(f"the audio file cannot be read ({error.reason})") from None
        return cast(BinaryIO, io.BufferedReader(Slice(file, *self.place)) if self.place else file)

    def read(self, longest: float) -> bytes:
        """Returns the recording as the bytes of an audio file.

        Args:
            longest: maximum length of a part of an audio file, in seconds.

        Raises:
            ValueError: if the file cannot be read, or the part is not in it or too long.
        """
        with self.open() as file:
            if self.start or self.end is not None:
                return cut(file, self.start, self.end, longest)
            content = file.read(AUDIO_SIZE + 1)
        if len(content) > AUDIO_SIZE:
            raise ValueError(
                f"the audio file cannot be read (it is larger than {AUDIO_SIZE / 2**20:g} MiB)"
            )
        return content


class Slice(io.RawIOBase):
    """A range of the bytes of a file, as a file.

    Args:
        file: closed together with the slice.
        offset: where the range begins.
        size: number of bytes; fewer at the end of the file.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def readable(self) -> bool:
        """Returns that it can be read."""
        return True

    def seekable(self) -> bool:
        """Returns that it can be read from anywhere."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to a position, from 0 to the size."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        self.at = max(start + offset, 0)
        return self.at

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Reads into a buffer and returns the number of bytes."""
        self.file.seek(self.offset + self.at)
        content = self.file.read(max(min(len(buffer), self.size - self.at), 0))
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
        super().close()


class Corpus(Protocol):
    """Protocol of corpora; `len` is the number of recordings.

    Recordings are yielded one by one, so that memory does not grow with the audio. A corpus that
    leaves `held_out` to a split has it as the attribute `split`. If it has a method `found()`, its
    lines are logged before anything is read.
    """

    def __len__(self) -> int: ...

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings, always in the same order."""
        ...


@dataclass(frozen=True, kw_only=True)
class SplitCorpus:
    """Base class of corpora whose validation split can be chosen.

    Attributes:
        name: of the data set.
        held_out: share of the utterances for validation, or a file with the ids of utterances or
            speakers, one per line. Not used where the corpus itself has a validation split.
        held_out_by: "sentence": no sentence is in both splits; "speaker": no speaker is.
    """

    name: str
    held_out: Fraction | str = 0.05
    held_out_by: str = "sentence"

    def __post_init__(self) -> None:
        self.split  # noqa: B018  # refuses values that it does not know

    @property
    def split(self) -> Split:
        """How utterances are chosen for validation."""
        return Split(held_out=self.held_out, by=self.held_out_by)


@dataclass(frozen=True, kw_only=True)
class ContainerCorpus(SplitCorpus):
    """Base class of corpora in files that hold the audio of many utterances.

    Attributes:
        files: their paths.
        valid: those with the utterances for validation; none: a split is made.
        columns: which of them to read, see `Table`.
    """

    files: Sequence[str]
    valid: Sequence[str] = ()
    columns: Mapping[str, Key | None] = field(default_factory=dict)

    def paths(self) -> Iterator[tuple[Path, bool | None]]:
        """Yields each file, and whether its utterances are held out; None: the split decides."""
        for held_out, files in ((False, self.files), (True, self.valid)):
            for file in files:
                yield Path(file).expanduser(), held_out if self.valid else None

    @property
    def described(self) -> str:
        """The first file, and how many more there are."""
        more = len(self.files) + len(self.valid) - 1
        return f"{self.files[0]}{f' and {more} more' if more else ''}"


def text_lines(path: Path, hint: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a UTF-8 file, perhaps compressed as .gz, that are not blank.

    Bytes that are not UTF-8 become lone surrogates, so that only the utterance that has them is
    faulty.

    Args:
        path: of the file.
        hint: what the error tells the user to do.

    Yields:
        The numbers of the lines from 1, and the lines.

    Raises:
        UserError: if there is no such file, or a line is very long.
    """
    try:
        content: Any = open_regular(path)
        if path.suffix == ".gz":
            content = GzipFile(fileobj=content)
        with TextIOWrapper(content, "utf-8-sig", "surrogateescape") as file:
            number = 0
            while line := file.readline(SIZE):
                number += 1
                if len(line) == SIZE:
                    raise UserError(f"line {number} of {path} is longer than 4 MiB: {hint}")
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        raise UserError(f"there is no file {path}: {hint}") from None
    except (EOFError, OSError, zlib.error) as error:  # of a .gz
        raise UserError(f"{path} cannot be read ({error}): {hint}") from None


def text_of(path: Path) -> str:
    """Returns the content of a file with the text of one utterance, on one line.

    Bytes that are not UTF-8 become lone surrogates. A file that is missing or too large is empty.
    """
    try:
        content = read_bytes(path)
    except (OSError, DamagedFileError):
        return ""
    return " ".join(content.decode("utf-8-sig", "surrogateescape").split())
