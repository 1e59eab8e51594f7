"""What is known of a recording from all others: doubled texts, leakage, and its speaker's voice."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosyexp.data.filtering import Filter
from cosyexp.data.quality import TAG
from cosyexp.data.splits import text_key

MAX_UNKNOWN = 0.5  # share of a text that the tokenizer may not know


@dataclass
class Voice:
    """Sums over the speaker embeddings of one speaker."""

    count: int = 0
    total: Any = 0.0
    square: float = 0.0

    def add(self, embedding: np.ndarray) -> None:
        """Adds the embedding of one recording."""
        self.count += 1
        self.total = self.total + embedding
        self.square += float(embedding @ embedding)

    @property
    def mean(self) -> np.ndarray:
        """The mean of the embeddings, (speaker_dim,)."""
        return np.asarray(self.total / self.count)

    def distance(self, embedding: np.ndarray) -> float | None:
        """Returns the distance from the mean, whose RMS is 1; None for fewer than three."""
        spread = self.square / self.count - float(self.mean @ self.mean)
        if self.count < 3 or spread <= 1e-6 * self.square / self.count:
            return None
        return float(np.linalg.norm(embedding - self.mean) / np.sqrt(spread))


class Population:
    """Counts of texts and sums of embeddings, of all recordings without a fault.

    Keeps a 64-bit hash of each text.
    """

    def __init__(self) -> None:
        self.texts, self.held_out = Counter[int](), set[int]()
        self.voices: defaultdict[str, Voice] = defaultdict(Voice)

    def add(self, row: Mapping[str, Any], held_out: bool) -> None:
        """Adds a recording.

        Args:
            row: of a part.
            held_out: whether it is known to be for validation.
        """
        key = text_key(row["text"])
        self.texts[key] += 1
        if held_out:
            self.held_out.add(key)
        self.voices[row["speaker"]].add(np.array(row["embedding"], np.float64))

    def measures(self, row: Mapping[str, Any], held_out: bool) -> dict[str, float | None]:
        """Returns the values of `quality.OF_CORPUS` that do not need the tokenizer."""
        key = text_key(row["text"])
        return {
            "speaker_distance": self.voices[row["speaker"]].distance(
                np.array(row["embedding"], np.float64)
            ),
            "copies": self.texts[key] - 1,
            "leak": float(not held_out and key in self.held_out),
            "tags": len(TAG.findall(row["text"])),
        }


@dataclass(frozen=True)
class Rules:
    """Which of the recordings that can be encoded are left out.

    Attributes:
        filter: of the recordings to keep.
        unknown: returns the characters of a text that the tokenizer does not know.
        max_unknown: share of a text that the tokenizer may not know.
    """

    filter: Filter = field(default_factory=lambda: Filter(""))
    unknown: Callable[[str], Iterable[str]] = lambda text: ()
    max_unknown: float = MAX_UNKNOWN

    def unknown_share(self, text: str) -> float:
        """Returns the share of the characters, without white space, that are unknown."""
        characters = [c for c in text if not c.isspace()]
        unknown = set(self.unknown(text))
        count = sum(c in unknown or c.lower() in unknown for c in characters)
        return count / max(len(characters), 1)

    def fault(self, row: Mapping[str, Any]) -> str:
        """Returns what is wrong with a recording that can be used; empty: nothing."""
        share = row["unknown"]
        if share > self.max_unknown or share == 1:
            return f"the tokenizer does not know {share:.0%} of the text"
        return ""
