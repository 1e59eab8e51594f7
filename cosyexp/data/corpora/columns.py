"""The columns of a table: which of them hold the audio, the text, the id and the speaker.

The same names serve tables of text, JSON, parquet files and webdatasets.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cosyexp.errors import UserError

# Names of columns by what they hold, the preferred ones first.
NAMES = {
    "audio": (
        *("audio_data", "audio", "wav", "audio_filepath", "audio_file", "audio_path", "wav_path"),
        *("wav_file", "file_name", "filename", "filepath", "file", "path", "clip"),
    ),
    "text": (
        *("normalized_text", "text_normalized", "normalised_text", "text", "sentence"),
        *("transcript", "transcription"),
    ),
    "utt": ("utt", "utt_id", "utterance_id", "id", "key"),
    "speaker": ("speaker", "spk", "speaker_id", "speaker_name", "spk_id", "client_id"),
    "instruct": ("instruct", "instruction"),
    "start": ("offset",),  # others may tell where a file was cut from
    "end": (),
    "duration": ("duration",),
}
AUTO = "auto"  # a column is found by its name
SAMPLE = 1000  # rows that tell the columns of a table without a header
LABEL = 40  # characters of a speaker or a language; longer cells are text

Key = str | int


@dataclass(frozen=True)
class Columns:
    """Where a row holds what a recording needs: names, or numbers from 1 without a header.

    Attributes:
        keys: the column of the audio, text, utt, speaker, instruct, start and duration; those
            that there are.
        spare: where the text is if its column is empty, as in LJSpeech; None: nowhere.
    """

    keys: Mapping[str, Key]
    spare: Key | None = None

    def cells(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        """Returns what a row holds, by what it is."""
        cells = {what: row.get(key) for what, key in self.keys.items()}
        if self.spare is not None and not cells.get("text"):
            cells["text"] = row.get(self.spare)
        return cells

    def __str__(self) -> str:
        return ", ".join(f"{what} in {key!r}" for what, key in self.keys.items())


def columns_of(header: Sequence[str], wanted: Mapping[str, Key | None], where: str) -> Columns:
    """Finds the columns by the names in a header.

    Args:
        header: the names.
        wanted: columns that the user named; None: there is none; "auto" or absent: by its name.
        where: the file, for messages.

    Raises:
        UserError: there is no column for the audio or the text, or one that the user named.
    """
    by_name = {name.strip().casefold(): name for name in reversed(header)}
    keys: dict[str, Key] = {}
    for what, names in NAMES.items():
        named = wanted.get(what, AUTO)
        found = [by_name[name] for name in names if name in by_name]
        if named == AUTO and found:
            keys[what] = found[0]
        elif named not in (AUTO, None):
            if named not in header:
                _refuse(where, f"no column {named!r}", header, what)
            keys[what] = str(named)
    for what in ("audio", "text"):
        if what not in keys:
            _refuse(where, f"no column that is known to hold the {what}", header, what)
    return Columns(keys)


def is_header(row: Sequence[str]) -> bool:
    """Returns whether the first row of a table has two names of columns or more."""
    names = {name for names in NAMES.values() for name in names}
    return len(names & {name.strip().casefold() for name in row}) > 1


def columns_without_header(
    rows: Sequence[Sequence[str]], wanted: Mapping[str, Key | None], where: str
) -> Columns:
    """Finds the columns of a table without a header by what they hold.

    The first one names the audio. The text is the last one that does not hold numbers in all rows,
    as CSS10's fourth column holds durations. A speaker is before the text and holds few different
    words: `id|speaker|text` (Piper), `audio|speaker|language|text` (VITS, GPT-SoVITS).

    Args:
        rows: the first rows, of one size.
        wanted: numbers of columns that the user gave, see `columns_of`.
        where: the file, for messages.

    Raises:
        UserError: a number that the user gave is none of a column, or there is one column only.
    """
    table = [list(column) for column in zip(*rows, strict=True)]
    last = len(table)
    while last > 2 and all(is_number(cell) for cell in table[last - 1]):
        last -= 1
    keys: dict[str, Key] = {"audio": 1, "text": last}
    spare: Key | None = None
    if last > 2 and is_label(table[1]) and table[1] != table[2]:
        keys["speaker"] = 2
    elif last == 3:
        spare = 2  # LJSpeech: text, normalized text
    for what, number in wanted.items():
        if number == AUTO:
            continue
        keys.pop(what, None)
        if number is not None:
            if not isinstance(number, int) or not 1 <= number <= len(table):
                raise UserError(
                    f"{where} has {len(table)} columns without names, and "
                    f"corpus.columns.{what}={number} is none of them: give a number from 1"
                )
            keys[what] = number
            spare = None if what == "text" else spare
    if len(table) < 2:
        raise UserError(
            f"{where} has one column only: give what separates its columns as corpus.delimiter="
        )
    return Columns(keys, spare)


def common_size(rows: Sequence[Sequence[str]]) -> int:
    """Returns the most frequent number of cells of a row."""
    return Counter(map(len, rows)).most_common(1)[0][0]


def is_number(cell: str) -> bool:
    """Returns whether a cell holds a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def is_label(cells: Sequence[str]) -> bool:
    """Returns whether cells hold names, such as of speakers: short words, few of them different."""
    words = all(len(cell) <= LABEL and re.fullmatch(r"[\w.-]+", cell) for cell in cells)
    return words and (len(cells) == 1 or 2 * len(set(cells)) <= len(cells) + 1)


def _refuse(where: str, what: str, header: Sequence[str], role: str) -> NoReturn:
    raise UserError(
        f"{where} has {what}, but {', '.join(map(repr, header)) or 'nothing'}: name its columns as "
        f"corpus.columns.{role}=, or what separates them as corpus.delimiter="
    )
