"""Text to token ids. A family's YAML names one of these."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cosyexp.errors import UserError

PIECES = 50257  # of Whisper's multilingual vocabulary
END_OF_PROMPT = 151646  # behind Qwen2's 151,643 pieces and three marks


class Tokenizer(Protocol):
    """A small frozen dataclass: what it prints is part of the key under which token ids are cached.

    One that reads files has `content` too, a hash of them, so that ids of another vocabulary are not taken for its own.
    """

    def encode(self, text: str) -> list[int]: ...

    def unknown(self, text: str) -> Sequence[str]:
        """The characters of `text` that get no id."""
        ...


@dataclass(frozen=True, kw_only=True)
class CharacterTokenizer:
    """One id a character, from 1; a character that the alphabet lacks is left out. Case is folded.

    alphabet: the known characters, in the order of their ids.
    """

    alphabet: str

    def encode(self, text: str) -> list[int]:
        return [
            self.alphabet.index(character) + 1
            for character in text.lower()
            if character in self.alphabet
        ]

    def unknown(self, text: str) -> Sequence[str]:
        return sorted(set(text.lower()) - set(self.alphabet))


@dataclass(frozen=True, kw_only=True)
class WhisperTokenizer:
    """The multilingual byte-pair encoding of Whisper (Radford et al. 2022), with the special tokens of 100 languages.

    vocabulary: its tiktoken file; None: the one that the installed package openai-whisper ships.
    """

    vocabulary: str | None = None

    @property
    def content(self) -> str:
        return digest([Path(self.vocabulary)]) if self.vocabulary else ""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = whisper_encoding(self.vocabulary).encode(text, allowed_special="all")
        return ids

    def unknown(self, text: str) -> Sequence[str]:
        return []


@dataclass(frozen=True, kw_only=True)
class QwenTokenizer:
    """The byte-pair encoding of Qwen2, and the marks that a family added to it, such as <|endofprompt|>.

    folder: of the pretrained tokenizer (vocab.json and merges.txt, or tokenizer.json). marks: cosyvoice2 or cosyvoice3.
    """

    folder: str | None
    special_tokens: str

    @property
    def content(self) -> str:
        names = ("vocab.json", "merges.txt", "tokenizer.json")
        return digest([Path(self.folder) / name for name in names]) if self.folder else ""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = qwen_tokenizer(self.folder, self.special_tokens).encode(
            text, add_special_tokens=False
        )
        return ids

    def unknown(self, text: str) -> Sequence[str]:
        return []


def digest(files: Sequence[Path]) -> str:
    """Of the content of those that exist."""
    found = [(path, path.stat()) for path in files if path.is_file()]
    return _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    content = hashlib.blake2b(digest_size=8)
    for path, *_ in files:
        content.update(path.read_bytes())
    return content.hexdigest()


def read_special_tokens(name: str) -> list[str]:
    """The tokens behind a vocabulary that stand for no piece of text, in the order of their ids."""
    return (
        (Path(__file__).parent / "special_tokens" / f"{name}.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )


@cache
def whisper_encoding(vocabulary: str | None) -> Any:
    import tiktoken

    path = Path(vocabulary) if vocabulary else shipped_vocabulary()
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        if not ranks:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a tiktoken vocabulary ({error}): give family.tokenizer.vocabulary=<file>"
        ) from None
    if len(ranks) != PIECES:
        raise UserError(
            f"{path} is not the multilingual vocabulary of Whisper: it has {len(ranks)} pieces, not {PIECES}"
        )
    special = [*read_special_tokens("whisper"), *(f"<|{i * 0.02:.2f}|>" for i in range(1501))]
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ids = {token: len(ranks) + i for i, token in enumerate(special)}
    return tiktoken.Encoding("whisper", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)


def shipped_vocabulary() -> Path:
    spec = find_spec("whisper")
    path = (
        Path(spec.origin).parent / "assets" / "multilingual.tiktoken"
        if spec and spec.origin
        else None
    )
    if path is None or not path.exists():
        raise UserError(
            "the tokenizer needs Whisper's vocabulary: give family.tokenizer.vocabulary=<multilingual.tiktoken>, "
            "or pip install --no-deps openai-whisper"
        )
    return path


@cache
def qwen_tokenizer(folder: str | None, added: str) -> Any:
    from transformers import AutoTokenizer

    if folder is None or not Path(folder).is_dir():
        missing = "" if folder is None else f"there is no folder {folder}: "
        raise UserError(
            f"{missing}the llm of this family reads text as Qwen2 does: give the folder of its tokenizer, family.tokenizer.folder="
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} holds no tokenizer ({reason}): give the folder of Qwen2 as family.tokenizer.folder="
        ) from None
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": read_special_tokens(added),
        }
    )
    if (found := tokenizer.convert_tokens_to_ids("<|endofprompt|>")) != END_OF_PROMPT:
        raise UserError(
            f"{folder} is not the tokenizer of Qwen2: <|endofprompt|> has the id {found} there, not {END_OF_PROMPT}"
        )
    return tokenizer
