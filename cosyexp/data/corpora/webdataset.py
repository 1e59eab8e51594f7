"""A corpus in tar files of the webdataset layout: `x.flac` and `x.txt` or `x.json` in turn.

The audio is read from where it lies in the tar file, which is not unpacked.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cosyexp.data.corpora.base import ContainerCorpus, Recording
from cosyexp.data.corpora.columns import AUTO, NAMES
from cosyexp.data.corpora.names import is_audio
from cosyexp.data.corpora.recordings import recording
from cosyexp.errors import UserError, reason
from cosyexp.registry import register
from cosyexp.run.documents import SIZE, DamagedFileError, open_regular

TEXTS = ("normalized.txt", "txt", "lab")
SPEAKERS = ("speaker", "spk")


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class WebDataset(ContainerCorpus):
    """A corpus in tar files; the columns are keys of the JSON."""

    def _samples(self) -> Iterator[tuple[Path, bool | None, str, dict[str, Any]]]:
        """Yields file, split, key and members (by their extensions) of each utterance."""
        for path, held_out in self.paths():
            with opened(path) as tar:
                members = (member for member in tar if member.isreg())
                for key, group in groupby(members, lambda member: key_of(member.name)[0]):
                    sample = {
                        key_of(member.name)[1].lower(): content(tar, member) for member in group
                    }
                    if any(isinstance(value, tuple) for value in sample.values()):
                        yield path, held_out, key, sample

    def __str__(self) -> str:
        return f"a webdataset: {self.described}"

    def __len__(self) -> int:
        return sum(1 for _ in self._samples())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of the files."""
        for path, held_out, key, sample in self._samples():
            cells, fault = self._cells(sample)
            yield recording(
                cells,
                where=f"{key} in {path}",
                fault=fault,
                utt=key.rpartition("/")[2],
                speaker=self.name,
                path=str(path),
                place=next(value for value in sample.values() if isinstance(value, tuple)),
                held_out=held_out,
            )

    def _cells(self, sample: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        cells: dict[str, Any] = {}
        for what, names in (("text", TEXTS), ("speaker", SPEAKERS)):
            for name in names:
                if isinstance(sample.get(name), bytes):
                    cells[what] = sample[name].decode("utf-8-sig", "surrogateescape")
                    break
        if "json" not in sample:
            return cells, ""
        try:
            values = json.loads(sample["json"])
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            return cells, "its .json is not a JSON object"
        for what in ("text", "utt", "speaker", "instruct"):
            named = self.columns.get(what, AUTO)
            for name in NAMES[what] if named == AUTO else (str(named),):
                if name in values and what not in cells:
                    cells[what] = values[name]
        return cells, ""


def key_of(name: str) -> tuple[str, str]:
    """Returns the key of a member, which ends at the first dot of its name, and the extension."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | tuple[int, int] | None:
    """Returns offset and size of audio, and the bytes of other members that are small."""
    if is_audio(member.name):
        return member.offset_data, member.size
    file = tar.extractfile(member) if member.size <= SIZE else None
    return file.read() if file else None


@contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Opens a tar file.

    Raises:
        UserError: it is missing, damaged or compressed.
    """
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: correct corpus.root=") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, DamagedFileError) as error:
        if isinstance(error, UserError) and not isinstance(error, DamagedFileError):
            raise
        why = getattr(error, "reason", None) or reason(error)
        raise UserError(
            f"{path} cannot be read as a tar file ({why}): if it is compressed, decompress it"
        ) from None
