"""A corpus of audio files with a text file beside each, in folders of speakers or in one folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosyexp.data.corpora.base import Recording, SplitCorpus, text_of
from cosyexp.data.corpora.names import FOLDERS, is_audio, utterance_names, without_suffix
from cosyexp.registry import register

TEXTS = (".normalized.txt", ".txt", ".lab")


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Folders(SplitCorpus):
    """A corpus of `<speaker>/.../x.flac` and `x.txt`, `x.lab` or `x.normalized.txt`.

    Attributes:
        root: the folder. Speakers are its subfolders; without any there is one speaker.
    """

    root: str

    def _files(self) -> list[str]:
        root = Path(self.root).expanduser()
        return sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, _, names in os.walk(root)
            for name in names
            if is_audio(name)
        )

    def __str__(self) -> str:
        return f"audio files in {self.root} with a text file beside each"

    def __len__(self) -> int:
        return len(self._files())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of their paths."""
        files = self._files()
        name_of = utterance_names(files)
        for file in files:
            path = Path(self.root).expanduser() / file
            beside = (Path(f"{without_suffix(str(path))}{suffix}") for suffix in TEXTS)
            text = next((text for text in beside if text.is_file()), None)
            speaker = Path(file).parts[0]
            yield Recording(
                utt=name_of(file),
                text=text_of(text) if text else "",
                speaker=self.name if speaker in (Path(file).name, *FOLDERS) else speaker,
                path=str(path),
                fault="" if text else f"it has no text file beside it ({', '.join(TEXTS)})",
            )
