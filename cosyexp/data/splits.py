"""The choice of the utterances that are held out for validation, among those that can be used."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from cosyexp.errors import UserError
from cosyexp.run.documents import DamagedFileError, read_lines

log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """What the split of an utterance depends on.

    Attributes:
        usable: whether it has no fault.
        held_out: what the corpus or a list says; None: the split is to decide.
        group: hash of its sentence or of its speaker, which is in one split.
    """

    usable: bool
    held_out: bool | None
    group: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Chooses a share of the utterances, or those that a list names.

    Sentences or speakers are held out in the order of their hashes, so that the choice neither
    depends on the order of the corpus nor changes much when the corpus grows.

    Attributes:
        held_out: share of the utterances, or a file with ids of utterances or speakers, one a line.
        by: "sentence": no sentence is in both splits; "speaker": no speaker is.

    Raises:
        UserError: `by` is neither, or there is no such file.
    """

    held_out: float | str = 0.05
    by: str = "sentence"

    def __post_init__(self) -> None:
        if self.by not in ("sentence", "speaker"):
            raise UserError(
                f"corpus.held_out_by={self.by} is not a way to split: give sentence or speaker"
            )
        self.names  # noqa: B018  # reads the list

    @cached_property
    def names(self) -> frozenset[str] | None:
        """Ids of utterances and speakers in the list; None without a list."""
        if not isinstance(self.held_out, str):
            return None
        try:
            lines = read_lines(Path(self.held_out).expanduser())
        except (OSError, DamagedFileError) as error:
            raise UserError(
                f"corpus.held_out={self.held_out} is neither a share nor a readable list "
                f"({getattr(error, 'reason', None) or getattr(error, 'strerror', error)}): give "
                "0.05 or the like, or a text file with one id of an utterance or speaker per line"
            ) from None
        return frozenset(normalize("NFC", line.strip()) for line in lines if line.strip())

    def planned(self, utt: str, speaker: str, held_out: bool | None) -> bool | None:
        """Returns whether an utterance is held out, as the corpus or a list says; None: unknown."""
        if self.names is not None:
            return utt in self.names or speaker in self.names
        return held_out

    def candidate(self, row: Mapping[str, Any]) -> Candidate:
        """Returns what the split of a recording depends on.

        Args:
            row: with the columns utt, text, speaker, held_out and fault.
        """
        group = hashed(row["speaker"]) if self.by == "speaker" else text_key(row["text"])
        planned = self.planned(row["utt"], row["speaker"], row["held_out"])
        return Candidate(not row["fault"], planned, group)

    def choose(self, candidates: Sequence[Candidate]) -> list[bool]:
        """Returns for each utterance whether it is held out; of those with a fault none is.

        At least one is, if the share is not 0 and another is left for training. A sentence or a
        speaker with more than half of the utterances is not held out.
        """
        open_ = Counter(c.group for c in candidates if c.usable and c.held_out is None)
        usable = sum(c.usable for c in candidates)
        share = 0.0 if isinstance(self.held_out, str) else self.held_out
        wanted = max(round(share * open_.total()), 1) if share else 0
        chosen: set[int] = set()
        count = 0
        for group, size in sorted(open_.items()):
            if count < wanted and 2 * (count + size) <= usable:
                chosen.add(group)
                count += size
        held_out = [
            c.usable and (c.group in chosen if c.held_out is None else c.held_out)
            for c in candidates
        ]
        self._report(candidates, held_out, count < wanted)
        return held_out

    def _report(
        self, candidates: Sequence[Candidate], held_out: Sequence[bool], too_few: bool
    ) -> None:
        usable, valid = sum(c.usable for c in candidates), sum(held_out)
        if all(c.held_out is None for c in candidates):
            how = f"by {self.by}"
        else:
            how = "as in the list" if self.names is not None else "as in the corpus"
        log.info("%d utterances for training, %d for validation, %s", usable - valid, valid, how)
        if self.names is not None and not valid:
            log.warning(
                "corpus.held_out=%s names no utterance and no speaker of those that can be used",
                self.held_out,
            )
        if too_few and not valid:
            log.warning(
                "nothing is held out for validation, as no %s leaves enough for training: add "
                "recordings, or train without validation (data.valid=null)",
                self.by,
            )


def text_key(text: str) -> int:
    """Returns a hash of 64 bits of the letters and digits of a text, without case."""
    return hashed("".join(filter(str.isalnum, text.casefold())))


def hashed(content: str) -> int:
    """Returns a hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())
