"""A corpus in manifests of Lhotse (Zelasko et al. 2021): cuts, or recordings and supervisions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosyexp.data.corpora.base import Recording, SplitCorpus
from cosyexp.data.corpora.names import AudioFinder
from cosyexp.data.corpora.recordings import recording
from cosyexp.data.corpora.rows import Row, json_rows
from cosyexp.registry import register

WHOLE = 0.01  # seconds by which a supervision may differ from its recording to be all of it


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Lhotse(SplitCorpus):
    """A corpus in manifests of Lhotse; an utterance is a supervision.

    Attributes:
        path: of a manifest of cuts or of supervisions (JSON lines, perhaps .gz).
        audio: path of the manifest of recordings; None: the cuts hold them.
    """

    path: str
    audio: str | None = None

    def _supervisions(self) -> Iterator[tuple[int, Any, Any, Any, str]]:
        """Yields line, recording, supervision, its offset and the fault of the line."""
        known: dict[Any, Any] = {}
        for row in json_rows(Path(self.audio).expanduser()) if self.audio else ():
            known[str(row.cells.get("id"))] = row.cells
        for row in json_rows(Path(self.path).expanduser()):
            if self.audio:
                found = known.get(str(row.cells.get("recording_id")))
                yield row.number, found, row.cells, 0.0, row.fault
            else:
                yield from self._of_cut(row)

    def _of_cut(self, row: Row) -> Iterator[tuple[int, Any, Any, Any, str]]:
        inner = row.cells.get("supervisions")
        supervisions = inner if isinstance(inner, list) and inner else [{}]
        for number, supervision in enumerate(supervisions):
            cells = dict(supervision) if isinstance(supervision, dict) else {}
            if len(supervisions) == 1:
                cells["id"] = row.cells.get("id", cells.get("id"))
            cells.setdefault("id", f"{row.cells.get('id')}-{number}")
            cells.setdefault("duration", row.cells.get("duration"))
            yield row.number, row.cells.get("recording"), cells, row.cells.get("start"), row.fault

    def __str__(self) -> str:
        return f"manifests of Lhotse: {self.path}{f' and {self.audio}' if self.audio else ''}"

    def __len__(self) -> int:
        return sum(1 for _ in self._supervisions())

    def recordings(self) -> Iterator[Recording]:
        """Yields the supervisions in their order."""
        find = AudioFinder(Path(self.path).expanduser().parent)
        for number, audio, supervision, offset, fault in self._supervisions():
            path, problem = source_of(audio)
            cells = {
                "utt": supervision.get("id"),
                "text": supervision.get("text"),
                "speaker": supervision.get("speaker"),
                **span(audio, supervision, offset),
            }
            if cells["speaker"] is None:
                del cells["speaker"]
            yield recording(
                cells,
                where=f"line {number} of {self.path}",
                fault=fault or problem,
                utt=f"line {number}",
                speaker=self.name,
                path=find(path) if path else "",
            )


def source_of(audio: Any) -> tuple[str, str]:
    """Returns the path in a recording of Lhotse, and a fault if it is not one file."""
    sources = audio.get("sources") if isinstance(audio, Mapping) else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], Mapping):
        return "", "it has no recording with one source"
    kind, source = sources[0].get("type"), sources[0].get("source")
    if kind != "file" or not isinstance(source, str):
        return "", f"its audio is a source of type {kind} instead of a file"
    return source, ""


def span(audio: Any, supervision: Mapping[str, Any], offset: Any) -> dict[str, Any]:
    """Returns start and duration of a supervision; empty if it is the whole recording."""
    start, duration = supervision.get("start", 0.0), supervision.get("duration")
    total = audio.get("duration") if isinstance(audio, Mapping) else None
    try:
        start = float(start) + float(offset or 0.0)
        if abs(start) < WHOLE and abs(float(total) - float(duration)) < WHOLE:  # type: ignore[arg-type]
            return {}
    except (TypeError, ValueError):
        pass  # a fault, which the span of the recording tells
    return {"start": start, "duration": duration}
