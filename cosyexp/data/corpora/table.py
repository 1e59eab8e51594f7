"""A corpus in a table of recordings: CSV, TSV, lists with | and JSON lines, with or without names.

LJSpeech, CSS10, Piper, VITS, GPT-SoVITS, F5, NeMo and Common Voice are tables.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cosyexp.data.corpora.base import Recording, SplitCorpus
from cosyexp.data.corpora.columns import Key
from cosyexp.data.corpora.names import AudioFinder, utterance_names
from cosyexp.data.corpora.recordings import recording
from cosyexp.data.corpora.rows import Rows, read_rows
from cosyexp.registry import register


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Table(SplitCorpus):
    """A corpus in a table of recordings.

    Attributes:
        path: of the table.
        valid: path of another table, with the utterances for validation; None: a split is made.
        columns: for audio, text, utt, speaker, instruct, start, end and duration the name of the
            column, or its number from 1 if there is no header; "auto": by the usual names; None:
            there is no such column. Without utt the id is the name of the audio file, without
            speaker all utterances have one speaker. A start, with an end or a duration, makes an
            utterance a part of a file, all in seconds.
        delimiter: between columns; None: what the lines have in common.
    """

    path: str
    valid: str | None = None
    columns: Mapping[str, Key | None] = field(default_factory=dict)
    delimiter: str | None = None

    def _tables(self) -> Iterator[tuple[Rows, bool | None]]:
        splits = {self.path: None} if self.valid is None else {self.path: False, self.valid: True}
        for path, held_out in splits.items():
            yield read_rows(Path(path).expanduser(), self.delimiter, self.columns), held_out

    def __str__(self) -> str:
        return "a table " + ", validation in ".join(str(rows) for rows, _ in self._tables())

    def __len__(self) -> int:
        return sum(1 for rows, _ in self._tables() for _ in rows)

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of the table."""
        tables = list(self._tables())
        name_of = utterance_names(
            audio
            for rows, _ in tables
            for row in rows
            if isinstance(audio := rows.columns.cells(row.cells).get("audio"), str)
        )
        for rows, held_out in tables:
            find = AudioFinder(rows.path.parent)
            for row in rows:
                cells = rows.columns.cells(row.cells)
                audio = cells.get("audio")
                named = isinstance(audio, str) and bool(audio.strip())
                yield recording(
                    cells,
                    where=f"line {row.number} of {rows.path}",
                    fault=row.fault or ("" if named else "it has no audio file"),
                    utt=name_of(str(audio).strip()) if named else f"line {row.number}",
                    speaker=self.name,
                    path=find(str(audio).strip()) if named else "",
                    held_out=held_out,
                )
