"""Text to token ids. A family's YAML names one of these."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Characters:
    """One id a character, from 1; 0 is a character that the alphabet lacks. Case is folded.

    alphabet: the known characters, in the order of their ids.
    """

    alphabet: str

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.find(character) + 1 for character in text.lower()]

    def unknown(self, text: str) -> Sequence[str]:
        """The characters of `text` that have no id of their own."""
        return sorted(set(text.lower()) - set(self.alphabet))

    @property
    def size(self) -> int:
        return len(self.alphabet) + 1
