"""A corpus in a table of recordings: CSV, TSV or JSON lines, with columns of any names."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosyexp.arguments import Fraction
from cosyexp.data.corpora.base import Recording, held_out, text_lines
from cosyexp.errors import UserError
from cosyexp.registry import register

DELIMITERS = {".csv": ",", ".tsv": "\t"}
HINT = "give the table as corpus.path="


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Table:
    """A corpus in a table of recordings.

    A relative path of audio is looked up in the folder of the table, then in the current folder.

    Attributes:
        name: of the data set.
        path: of the table.
        columns: names of the columns audio, text, utt, speaker and instruct. None: there is no such
            column. Without utt the id is the name of the audio file, without speaker all utterances
            have one speaker.
        delimiter: between columns; None: by the suffix of the file.
        held_out: share of the utterances for validation, spread evenly.
    """

    name: str
    path: str
    columns: Mapping[str, str | None]
    delimiter: str | None
    held_out: Fraction

    def _lines(self) -> Iterator[tuple[int, str]]:
        return text_lines(Path(self.path), HINT)

    def _rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the rows with their line numbers; invalid JSON gives an empty row."""
        if Path(self.path).suffix in (".jsonl", ".json"):
            yield from ((number, json_row(line)) for number, line in self._lines())
            return
        delimiter = self.delimiter or DELIMITERS.get(Path(self.path).suffix)
        if delimiter is None:
            raise UserError(
                f"{self.path} is neither .csv, .tsv nor .jsonl: "
                "give what separates its columns as corpus.delimiter="
            )
        lines = (line + "\n" for _, line in self._lines())
        # Only in a CSV do quotation marks enclose a cell; elsewhere they belong to the text.
        quotes: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        reader = csv.DictReader(lines, delimiter=delimiter, quoting=quotes)
        try:
            header = list(reader.fieldnames or [])
            if absent := [
                column for column in self.columns.values() if column and column not in header
            ]:
                raise UserError(
                    f"{self.path} has no column {absent[0]!r}, but "
                    f"{', '.join(map(repr, header)) or 'nothing'}: name its columns as "
                    "corpus.columns.<what>=, or what separates them as corpus.delimiter="
                )
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise UserError(
                f"{self.path} cannot be read as a table, line {reader.line_num}: {error}"
            ) from None

    def __len__(self) -> int:
        return sum(1 for _ in self._rows())

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of the table."""
        total = len(self)
        for i, (number, row) in enumerate(self._rows()):
            cells = {
                what: str(row.get(column) or "").strip() if column else ""
                for what, column in self.columns.items()
            }
            utt = cells["utt"] or Path(cells["audio"]).stem or f"line {number}"
            in_folder = Path(self.path).parent / cells["audio"]
            yield Recording(
                utt=utt,
                text=cells["text"],
                speaker=cells["speaker"] if self.columns["speaker"] else self.name,
                path=str(in_folder) if os.path.exists(in_folder) else cells["audio"],
                held_out=held_out(i, total, self.held_out),
                instruct=cells["instruct"],
                fault="" if cells["audio"] else f"line {number} of {self.path} has no audio file",
            )


def json_row(line: str) -> Mapping[str, Any]:
    """Parses a line of JSON; returns an empty row if it is not a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
