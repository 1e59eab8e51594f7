"""Rows of tables of text: CSV and other separated values, JSON lines, and a JSON list.

A row that cannot be read is a fault of that row: it never changes what the others hold.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cosyexp.data.corpora.base import text_lines
from cosyexp.data.corpora.columns import (
    AUTO,
    SAMPLE,
    Columns,
    Key,
    columns_of,
    columns_without_header,
    common_size,
    is_header,
)
from cosyexp.errors import UserError
from cosyexp.run.documents import LIST_SIZE, DamagedFileError, read_text

JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
CANDIDATES = "|\t,;"
HINT = "give a table as corpus.path="


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        number: of its line, from 1.
        cells: by the names of the columns, or by their numbers from 1.
        fault: why it cannot be used; empty: no fault.
    """

    number: int
    cells: Mapping[Any, Any]
    fault: str = ""


@dataclass(frozen=True)
class Rows:
    """A table of text.

    Attributes:
        path: of the file.
        columns: what its columns hold.
        delimiter: between them; None: the rows are JSON.
        header: names of the columns; None: they have none.
        size: number of cells of a row.
    """

    path: Path
    columns: Columns
    delimiter: str | None = None
    header: Sequence[str] | None = None
    size: int = 0

    def __iter__(self) -> Iterator[Row]:
        if self.delimiter is None:
            yield from json_rows(self.path)
            return
        lines = islice(text_lines(self.path, HINT), 0 if self.header is None else 1, None)
        for number, line in lines:
            try:
                cells = split(line, self.delimiter)
            except csv.Error as error:
                yield Row(number, {}, f"its quotation marks are not those of a CSV ({error})")
                continue
            keys = self.header or range(1, self.size + 1)
            wrong = len(cells) != self.size
            yield Row(
                number,
                dict(zip(keys, cells, strict=False)),
                f"it has {len(cells)} cells instead of {self.size}" if wrong else "",
            )

    def __str__(self) -> str:
        kind = {None: "JSON", "\t": "tabs between columns"}.get(
            self.delimiter, f"{self.delimiter!r} between columns"
        )
        return f"{self.path} ({kind}): {self.columns}"


def read_rows(path: Path, delimiter: str | None, wanted: Mapping[str, Key | None]) -> Rows:
    """Looks at the first rows of a table, and returns the table.

    Args:
        path: of the file.
        delimiter: between columns; None: what the first rows have in common.
        wanted: columns that the user named, see `columns_of`.

    Raises:
        UserError: there is no such file, or its columns cannot be told.
    """
    if path.name.endswith(JSON):
        names: dict[str, None] = {}
        for row in islice(json_rows(path), SAMPLE):
            names |= dict.fromkeys(map(str, row.cells))
        return Rows(path, columns_of(list(names), wanted, str(path)))
    lines = [line for _, line in islice(text_lines(path, HINT), SAMPLE)]
    delimiter = delimiter or sniff(lines, path)
    rows = [cells for line in lines if (cells := _split(line, delimiter))]
    named = [key for key in wanted.values() if isinstance(key, str) and key != AUTO]
    numbered = any(isinstance(key, int) for key in wanted.values())
    header = rows[0] if rows else []
    by_content = delimiter != "," and not named and not is_header(header)
    if numbered or (rows and by_content):
        size = common_size(rows)
        alike = [row for row in rows if len(row) == size]
        columns = columns_without_header(alike, wanted, str(path))
        return Rows(path, columns, delimiter, None, size)
    return Rows(path, columns_of(header, wanted, str(path)), delimiter, header, len(header))


def json_rows(path: Path) -> Iterator[Row]:
    """Yields the objects of JSON lines, or of a file that holds a list of them."""
    lines = text_lines(path, HINT)
    first = next(lines, (0, ""))
    if first[1].lstrip().startswith("[") and path.suffix != ".gz":
        yield from _json_list(path)
        return
    for number, line in [first] if first[0] else []:
        yield _json_row(number, line)
    for number, line in lines:
        yield _json_row(number, line)


def _json_row(number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return Row(number, row) if isinstance(row, dict) else Row(number, {}, "it is not a JSON object")


def _json_list(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(read_text(path, LIST_SIZE))
    except (ValueError, RecursionError, DamagedFileError) as error:
        raise UserError(f"{path} is not JSON ({getattr(error, 'reason', error)}): {HINT}") from None
    for number, row in enumerate(content, 1):
        known = isinstance(row, dict)
        yield Row(number, row if known else {}, "" if known else "it is not a JSON object")


def sniff(lines: Sequence[str], path: Path) -> str:
    """Returns what separates the columns: what all of the first lines have, or by the suffix.

    Raises:
        UserError: neither tells.
    """
    for candidate in CANDIDATES:
        share = sum(candidate in line for line in lines) / max(len(lines), 1)
        if share >= 0.9 and candidate in lines[0]:
            return candidate
    if path.suffix in DELIMITERS:
        return DELIMITERS[path.suffix]
    raise UserError(
        f"{path} has no separator of columns that is known: give it as corpus.delimiter="
    )


def split(line: str, delimiter: str) -> list[str]:
    """Splits a line into cells.

    Only in a CSV do quotation marks enclose a cell; elsewhere they belong to the text.

    Raises:
        csv.Error: a quotation mark is not closed, or is followed by more text.
    """
    if delimiter != ",":
        return line.split(delimiter)
    return next(csv.reader([line], strict=True))


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return split(line, delimiter)
    except csv.Error:
        return []
