"""Text tokenizers, which turn text into token ids; the YAML of a family names one of them."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cosyexp.errors import UserError, reason
from cosyexp.registry import register
from cosyexp.run.documents import LIST_SIZE, open_regular, read_bytes

PIECES = 50257  # of Whisper's multilingual vocabulary
END_OF_PROMPT = 151646  # follows the 151,643 pieces of Qwen2 and three special tokens


class Tokenizer(Protocol):
    """Protocol of text tokenizers, which are small frozen dataclasses.

    Their `repr` is part of the key under which token ids are cached. One that reads files also has
    a property `content`, a hash of them, so that another vocabulary has its own cache.
    """

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        ...

    def unknown(self, text: str) -> Sequence[str]:
        """Returns the characters of a text that get no id."""
        ...


@dataclass(frozen=True, kw_only=True)
class Extensible:
    """Base class of tokenizers that can be given more tokens.

    Attributes:
        extra: the new tokens, whose ids follow those of the vocabulary. Where several begin at the
            same character of a text, the longest counts.

    Raises:
        ValueError: a new token is empty, or is named twice.
    """

    extra: Sequence[str] | None = field(default=None, repr=False)  # counts by `content`

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", tuple(self.extra or ()))
        if "" in self.new_tokens or len(set(self.new_tokens)) < len(self.new_tokens):
            raise ValueError("extra must be a list of different texts, none of them empty")

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """The new tokens, in the order of their ids."""
        return tuple(self.extra or ())

    @property
    def content(self) -> str:
        """What the token ids depend on besides the `repr`."""
        return repr(self.new_tokens) if self.new_tokens else ""

    def new_ids(self) -> list[int]:
        """Returns the ids of the new tokens.

        Raises:
            UserError: a new token is a token of the vocabulary already.
        """
        raise NotImplementedError

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yields the pieces of a text, each with its id if it is a new token."""
        ids = dict(zip(self.new_tokens, self.new_ids(), strict=True))
        longest_first = sorted(ids, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if ids else [text]
        return ((part, ids.get(part)) for part in parts)


@register("tokenizer")
@dataclass(frozen=True, kw_only=True)
class CharacterTokenizer(Extensible):
    """One id per character, from 1; case is folded and unknown characters are left out.

    Attributes:
        alphabet: the known characters, in the order of their ids.
    """

    alphabet: str

    def new_ids(self) -> list[int]:
        """Returns the ids of the new tokens, see `Extensible`."""
        refuse_known(token for token in self.new_tokens if token in set(self.alphabet))
        return [len(self.alphabet) + 1 + i for i in range(len(self.new_tokens))]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the new tokens and the known characters."""
        ids: list[int] = []
        for part, token in self.split(text):
            known = [self.alphabet.index(c) + 1 for c in part.lower() if c in self.alphabet]
            ids += known if token is None else [token]
        return ids

    def unknown(self, text: str) -> Sequence[str]:
        """Returns the characters that are not in the alphabet, in lower case."""
        rest = "".join(part for part, token in self.split(text) if token is None)
        return sorted(set(rest.lower()) - set(self.alphabet))


@register("tokenizer")
@dataclass(frozen=True, kw_only=True)
class WhisperTokenizer(Extensible):
    """Whisper's multilingual byte-pair encoding, with the special tokens of 100 languages.

    (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision")

    Attributes:
        vocabulary: tiktoken file; None: the one of the installed package openai-whisper.
    """

    vocabulary: str | None = field(default=None, repr=False)  # its content counts, see `content`

    @property
    def content(self) -> str:
        """Hash of the vocabulary file, if it is not that of the package, and the new tokens."""
        return (digest([Path(self.vocabulary)]) if self.vocabulary else "") + super().content

    def new_ids(self) -> list[int]:
        """Returns the ids of the new tokens, see `Extensible`."""
        encoding = whisper_encoding(self.vocabulary)
        refuse_known(token for token in self.new_tokens if token in encoding.special_tokens_set)
        return [encoding.n_vocab + i for i in range(len(self.new_tokens))]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, in which special tokens are recognized."""
        encoding = whisper_encoding(self.vocabulary)
        ids: list[int] = []
        for part, token in self.split(text):
            ids += encoding.encode(part, allowed_special="all") if token is None else [token]
        return ids

    def unknown(self, text: str) -> Sequence[str]:
        """Returns nothing, as a byte-level vocabulary covers every character."""
        return []


@register("tokenizer")
@dataclass(frozen=True, kw_only=True)
class QwenTokenizer(Extensible):
    """Byte-pair encoding of Qwen2, with the special tokens of a family such as <|endofprompt|>.

    Attributes:
        folder: of the pretrained tokenizer (vocab.json and merges.txt, or tokenizer.json).
        special_tokens: cosyvoice2 or cosyvoice3.
    """

    folder: str | None = field(repr=False)  # its content counts, see `content`
    special_tokens: str

    @property
    def content(self) -> str:
        """Hash of the files of the tokenizer, if there is a folder, and the new tokens."""
        names = ("vocab.json", "merges.txt", "tokenizer.json")
        files = [Path(self.folder) / name for name in names] if self.folder else []
        return (digest(files) if files else "") + super().content

    @property
    def library(self) -> Any:
        """The tokenizer of transformers, with the special tokens and the new ones."""
        return qwen_tokenizer(self.folder, self.special_tokens, self.new_tokens)

    def new_ids(self) -> list[int]:
        """Returns the ids of the new tokens, see `Extensible`."""
        ids: list[int] = self.library.convert_tokens_to_ids(list(self.new_tokens))
        return ids

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, in which special and new tokens are recognized."""
        ids: list[int] = self.library.encode(text, add_special_tokens=False)
        return ids

    def unknown(self, text: str) -> Sequence[str]:
        """Returns nothing, as a byte-level vocabulary covers every character."""
        return []


def refuse_known(tokens: Iterable[str]) -> None:
    """Checks that there are none of the new tokens that the vocabulary has already.

    Raises:
        UserError: there is one.
    """
    for token in tokens:
        raise UserError(
            f"family.tokenizer.extra={token!r} is a token of the vocabulary already: leave it out"
        )


def digest(files: Sequence[Path]) -> str:
    """Returns a hash of the content of those files that exist."""
    existing = [(path, path.stat()) for path in files if path.is_file()]
    return _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in existing))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    content = hashlib.blake2b(digest_size=8)
    for path, *_ in files:
        content.update(read_bytes(path, LIST_SIZE))
    return content.hexdigest()


def read_special_tokens(name: str) -> list[str]:
    """Returns the special tokens that follow a vocabulary, in the order of their ids.

    Args:
        name: whisper, cosyvoice2 or cosyvoice3: a file in `special_tokens/`.

    Raises:
        UserError: if there is no such file.
    """
    paths = {path.stem: path for path in (Path(__file__).parent / "special_tokens").glob("*.txt")}
    if name not in paths:
        raise UserError(
            f"family.tokenizer.special_tokens={name} is not one of {', '.join(sorted(paths))}"
        )
    return paths[name].read_text(encoding="utf-8").splitlines()


@cache
def whisper_encoding(vocabulary: str | None) -> Any:
    """Returns the tiktoken encoding of Whisper, built once per process.

    Args:
        vocabulary: tiktoken file; None: the one of the installed package openai-whisper.

    Raises:
        UserError: if the file cannot be read or is not Whisper's multilingual vocabulary.
    """
    import tiktoken

    path = Path(vocabulary) if vocabulary else shipped_vocabulary()
    try:
        content = read_bytes(path, LIST_SIZE)
        pairs = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        if not ranks:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a tiktoken vocabulary ({error}): "
            "give family.tokenizer.vocabulary=<file>"
        ) from None
    if len(ranks) != PIECES:
        raise UserError(
            f"{path} is not Whisper's multilingual vocabulary, as it has {len(ranks)} pieces "
            f"instead of {PIECES}: give family.tokenizer.vocabulary=<multilingual.tiktoken>"
        )
    special = [*read_special_tokens("whisper"), *(f"<|{i * 0.02:.2f}|>" for i in range(1501))]
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ids = {token: len(ranks) + i for i, token in enumerate(special)}
    return tiktoken.Encoding("whisper", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)


def shipped_vocabulary() -> Path:
    """Returns the path of the vocabulary in the installed package openai-whisper.

    Raises:
        UserError: if the package is not installed.
    """
    spec = find_spec("whisper")
    path = (
        Path(spec.origin).parent / "assets" / "multilingual.tiktoken"
        if spec and spec.origin
        else None
    )
    if path is None or not path.exists():
        raise UserError(
            "the tokenizer needs Whisper's vocabulary: give "
            "family.tokenizer.vocabulary=<multilingual.tiktoken>, "
            "or pip install --no-deps openai-whisper"
        )
    return path


@cache
def qwen_tokenizer(folder: str | None, added: str, extra: tuple[str, ...] = ()) -> Any:
    """Returns the tokenizer of Qwen2 with the special tokens of a family, built once per process.

    Args:
        folder: of the pretrained tokenizer.
        added: name of the special tokens, see `read_special_tokens`.
        extra: new tokens, whose ids follow.

    Raises:
        UserError: if the folder does not exist or does not have the tokenizer of Qwen2, or if a new
            token is in it already.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    if folder is None or not Path(folder).is_dir():
        missing = "" if folder is None else f"there is no folder {folder}; "
        raise UserError(
            f"{missing}the llm of this family needs the tokenizer of Qwen2: "
            "give its folder as family.tokenizer.folder="
        )
    for path in Path(folder).iterdir():
        if path.suffix in (".json", ".txt", ".jinja"):  # what transformers reads whole
            open_regular(path, LIST_SIZE).close()
    try:
        # not AutoTokenizer: the files in the folder would choose the class, or bring their own
        tokenizer: Any = Qwen2Tokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library's own have no common class
        raise UserError(
            f"{folder} has no readable tokenizer ({reason(error)}): "
            "give the folder of Qwen2 as family.tokenizer.folder="
        ) from None
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": read_special_tokens(added),
        }
    )
    if (actual := tokenizer.convert_tokens_to_ids("<|endofprompt|>")) != END_OF_PROMPT:
        raise UserError(
            f"{folder} is not the tokenizer of Qwen2, as <|endofprompt|> has the id {actual} "
            f"instead of {END_OF_PROMPT}: give the folder of Qwen2 as family.tokenizer.folder="
        )
    last = max(tokenizer.convert_tokens_to_ids(read_special_tokens(added)))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in extra])
    refuse_known(token for token in extra if tokenizer.convert_tokens_to_ids(token) <= last)
    return tokenizer
