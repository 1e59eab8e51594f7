"""A table of recordings: CSV, TSV or JSON lines, its columns named by the user."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosyexp.data.corpora.base import Recording, held_out, text_lines
from cosyexp.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TOLD = "give the table as corpus.path="


@dataclass(frozen=True, kw_only=True)
class Table:
    """name: of the data set. path: the table. held_out: the share of the utterances, spread evenly, kept for validation.

    columns: what the table calls audio, text, utt, speaker and instruct; null: without utt an utterance has the name of its audio file,
    without speaker all have one. delimiter: between columns; null: by the file's name. A relative path of audio is looked for beside the
    table, then from the current folder.
    """

    name: str
    path: str
    columns: Mapping[str, str | None]
    delimiter: str | None
    held_out: float

    def _lines(self) -> Iterator[tuple[int, str]]:
        return text_lines(Path(self.path), TOLD)

    def _rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows with the numbers of their lines; an empty row where a line is no row."""
        if Path(self.path).suffix in (".jsonl", ".json"):
            yield from ((number, json_row(line)) for number, line in self._lines())
            return
        delimiter = self.delimiter or DELIMITERS.get(Path(self.path).suffix)
        if delimiter is None:
            raise UserError(
                f"{self.path} is neither .csv, .tsv nor .jsonl: say by corpus.delimiter= what is between its columns"
            )
        lines = (line + "\n" for _, line in self._lines())
        quotes: Any = (
            csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        )  # elsewhere a quotation mark is one of the text
        reader = csv.DictReader(lines, delimiter=delimiter, quoting=quotes)
        try:
            header = list(reader.fieldnames or [])
            if absent := [
                column for column in self.columns.values() if column and column not in header
            ]:
                raise UserError(
                    f"{self.path} has no column {absent[0]!r}, but {', '.join(map(repr, header)) or 'nothing'}: "
                    "name its columns by corpus.columns.<what>=, or what is between them by corpus.delimiter="
                )
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise UserError(
                f"{self.path} cannot be read as a table, line {reader.line_num}: {error}"
            ) from None

    def __len__(self) -> int:
        return sum(1 for _ in self._rows())

    def recordings(self) -> Iterator[Recording]:
        total = len(self)
        for i, (number, row) in enumerate(self._rows()):
            cells = {
                what: str(row.get(column) or "").strip() if column else ""
                for what, column in self.columns.items()
            }
            named = cells["utt"] or Path(cells["audio"]).stem or f"line {number}"
            beside = Path(self.path).parent / cells["audio"]
            yield Recording(
                utt=named,
                text=cells["text"],
                speaker=cells["speaker"] if self.columns["speaker"] else self.name,
                path=str(beside) if beside.exists() else cells["audio"],
                held_out=held_out(i, total, self.held_out),
                instruct=cells["instruct"],
                fault="" if cells["audio"] else f"line {number} of {self.path} names no audio",
            )


def json_row(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
