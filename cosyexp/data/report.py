"""The report of a preparation: hours, lengths, token rate, faults and unknown characters."""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cosyexp.run.documents import Fields
from cosyexp.run.files import replace_file

LENGTHS = ("shortest", "median", "longest")
NAMED = 10  # maximum number of entries of each list that is printed


class Report:
    """Statistics of the recordings of a preparation, which are added one after another.

    As a context manager it also writes the list of recordings with a fault, which is complete, or
    absent, at the end.

    Args:
        path: of that list, a table of id, reason and audio file.

    Attributes:
        total: number of recordings.
        dropped: number of recordings that are left out.
        filtered: how many of them the filter leaves out; the others have a fault.
        named: ids and reasons of the first of them.
        reasons: number of recordings of each kind of fault.
        examples: id and reason of the first recording of each kind.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.total, self.dropped, self.filtered = path, 0, 0, 0
        self.named: list[str] = []
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.characters: Counter[str] = Counter()
        self.seconds, self.tokens = array("d"), array("q")
        self._open = ExitStack()

    def __enter__(self) -> "Report":
        self._file = self._open.enter_context(replace_file(self.path))
        self._file.write(b"utt\treason\twav\n")
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)

    def add(self, row: Mapping[str, Any], *, chosen: bool = True) -> None:
        """Adds one recording.

        Args:
            row: its row in the file of a part, see `encoding.PART`.
            chosen: False if it is left out by the filter.
        """
        self.total += 1
        if not row["fault"]:
            self.seconds.append(row["seconds"])
            self.tokens.append(len(row["tokens"]))
            self.characters.update(set(row["text"]))
            return
        self.dropped += 1
        self.filtered += not chosen
        self.reasons[kind(row["fault"])] += 1
        self.examples.setdefault(kind(row["fault"]), f"{row['utt']}: {row['fault']}")
        if len(self.named) < NAMED:
            self.named.append(f"{row['utt']}: {row['fault']}")
        cells = (row["utt"], row["fault"], row["path"].decode("utf-8", "backslashreplace"))
        self._file.write(
            "\t".join(re.sub(r"[\t\r\n]", " ", cell) for cell in cells).encode() + b"\n"
        )

    def causes(self) -> str:
        """Returns the kinds of faults, the most frequent first, with counts and an example each."""
        causes = [
            f"{count} x {self.examples[reason]}"
            for reason, count in self.reasons.most_common(NAMED)
        ]
        more = len(self.reasons) - NAMED
        return "; ".join([*causes, f"and {more} kinds more"] if more > 0 else causes)

    def some(self, where: str) -> str:
        """Returns ids and reasons of the first recordings with a fault.

        Args:
            where: the file that names the others.
        """
        more = f"; and {self.dropped - NAMED} more in {where}" if self.dropped > NAMED else ""
        return "; ".join(self.named) + more

    def summary(self, unknown: Callable[[str], Iterable[str]]) -> dict[str, Any]:
        """Returns the statistics for `meta.yaml`.

        Args:
            unknown: returns the characters of a text that the tokenizer does not know.
        """
        seconds, tokens = np.array(self.seconds), np.array(self.tokens)
        texts = {
            character: self._texts_with(character)
            for character in unknown("".join(sorted(self.characters)))
        }
        return {
            "hours": round(float(seconds.sum()) / 3600, 3),
            "utterances": len(seconds),
            "seconds": dict(
                zip(LENGTHS, np.quantile(seconds, (0, 0.5, 1)).round(2).tolist(), strict=True)
            ),
            "tokens_a_second": round(float(tokens.sum() / seconds.sum()), 2),
            "left_out": dict(self.reasons.most_common()),
            "unknown_characters": {
                character: count
                for character, count in sorted(texts.items(), key=lambda item: (-item[1], item[0]))
                if not character.isspace()
            },
        }

    def _texts_with(self, character: str) -> int:
        """Returns how many texts have a character in either case, as a tokenizer may fold case."""
        return max(
            self.characters[character],
            self.characters[character.upper()] if len(character.upper()) == 1 else 0,
        )

    def facts(self) -> dict[str, Any]:
        """Returns the counts for the report on quality."""
        seconds = np.array(self.seconds)
        return {
            "recordings": self.total,
            "used": len(seconds),
            "hours": round(float(seconds.sum()) / 3600, 3),
            "left out": dict(self.reasons.most_common()),
        }


def kind(reason: str) -> str:
    """Returns a reason with its numbers replaced by #, so that equal kinds can be counted."""
    return re.sub(r"-?\d[\d.]*", "#", reason)


def lines(meta: Mapping[str, Any], out: Path) -> Iterable[str]:
    """Yields the content of `meta.yaml` as lines to print; a UserError tells if it is damaged.

    Args:
        meta: content of the file.
        out: the prepared folder.
    """
    fields = Fields(meta, out / "meta.yaml")
    yield (
        f"{out}: {fields.whole('utterances')} utterances, {fields.number('hours')} hours, "
        f"{len(fields.texts('speakers'))} speakers"
    )
    if "seconds" in meta:
        lengths = fields.inner("seconds")
        shortest, median, longest = (lengths.number(name) for name in LENGTHS)
        yield f"  lengths    {shortest} to {longest} s, median {median} s"
        yield f"  tokens     {fields.number('tokens_a_second')} per second"
    if left_out := fields.counts("left_out"):
        yield f"  left out   {sum(left_out.values())}, listed in {out}/dropped.tsv"
        yield from (f"  {count:8}   {reason}" for reason, count in left_out.items())
    if unknown := fields.counts("unknown_characters"):
        frequent = ", ".join(
            f"{character!r} in {texts} texts" for character, texts in list(unknown.items())[:NAMED]
        )
        yield (
            f"  unknown    {len(unknown)} characters that the tokenizer skips: "
            f"{frequent}{' ...' if len(unknown) > NAMED else ''}"
        )
    yield f"  report     {out}/report.html"
