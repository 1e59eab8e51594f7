"""Where recordings come from. To read another corpus, write a class like those beside this file, and a YAML in `conf/corpus/`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Recording:
    """audio: the bytes of an audio file. path: where it came from. held_out: for validation, never for training."""

    utt: str
    text: str
    speaker: str
    audio: bytes
    path: str
    held_out: bool


class Source(Protocol):
    def __len__(self) -> int: ...

    def recordings(self) -> Iterator[Recording]: ...
