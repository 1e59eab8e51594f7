"""Names of utterances and where their audio files are, from what a corpus says of them."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".wma")
FOLDERS = ("wavs", "wav", "audio", "audios", "clips")  # where the files of a table often are


def is_audio(name: str) -> bool:
    """Returns whether a file has the suffix of audio, in either case."""
    return name.lower().endswith(SUFFIXES)


def without_suffix(name: str) -> str:
    """Returns a name without the suffix of audio, if it has one."""
    return os.path.splitext(name)[0] if is_audio(name) else name


def utterance_names(paths: Iterable[str]) -> Callable[[str], str]:
    """Returns a function from paths of audio to ids of utterances.

    The id is the name of the file. If names repeat, as in `<speaker>/000.flac`, it is the path
    below the folder that all have in common, with `_` for `/`.
    """
    seen: set[int] = set()
    repeated, common = False, None
    for path in paths:
        folder, name = os.path.split(path)
        key = hash(without_suffix(name))
        repeated |= key in seen
        seen.add(key)
        common = folder if common is None else _common(common, folder)
    prefix = f"{common}/" if common else ""

    def name_of(path: str) -> str:
        whole = without_suffix(path)
        if not repeated:
            return os.path.basename(whole)
        return whole.removeprefix(prefix).replace("/", "_")

    return name_of


def _common(one: str, other: str) -> str:
    try:
        return os.path.commonpath([one, other])
    except ValueError:  # an absolute and a relative path, or a character 0
        return ""


class AudioFinder:
    """Finds the audio files that a table names.

    A name may lack the folder or the suffix, have the suffix in the other case, or its accents in
    another Unicode form. The folder of the table is tried first, then the current folder.

    Args:
        folder: of the table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: tuple[str, str] | None = None

    def __call__(self, name: str) -> str:
        """Returns the path of an audio file; if there is none, where it was expected."""
        name = os.path.expanduser(name)
        composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        for form in dict.fromkeys((name, composed, decomposed)):
            for folder, suffix in self._patterns():
                file = f"{without_suffix(form)}{suffix}" if suffix else form
                path = self.folder / folder / file
                if os.path.isfile(path):
                    self.last = (folder, suffix)
                    return str(path)
            if os.path.isfile(form):
                return form
        return str(self.folder / name)

    def _patterns(self) -> Iterator[tuple[str, str]]:
        """Yields folders and suffixes to try, those of the file before first."""
        if self.last:
            yield self.last
        for folder in ("", *FOLDERS):
            yield folder, ""
            for suffix in SUFFIXES:
                yield folder, suffix
                yield folder, suffix.upper()
