"""Reads our own files, and says in one sentence what is wrong with one.

A file may come from somebody else, so nothing in it can make a reader wait, run out of memory or
fail in another way: only regular files of limited size are read, YAML has no aliases, the nesting
is limited, and values are strings, numbers, booleans, lists and mappings with string keys.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cosyexp.errors import UserError

SIZE = 2**22  # bytes of a document
LIST_SIZE = 2**28  # bytes of a list of files or of a text
NODES = 500_000  # values and keys of a YAML document, which take two seconds
DEPTH = 64  # levels of nested lists and mappings
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DamagedFileError(UserError):
    """A file is not what was written, or was not written by cosyexp.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} is damaged, or not what cosyexp wrote ({reason}): restore it, or create it "
            f"again"
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedFileError, (self.path, self.reason)


# whole files --------------------------------------------------------------------------------------


def open_regular(path: Path, limit: int | None = None) -> BufferedReader:
    """Opens a regular file for reading; never waits, as opening a FIFO would.

    Args:
        path: the file.
        limit: how many bytes it may have; None: any number.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is a folder, a device, a FIFO or a socket, or is too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.exists() and not path.is_file():  # a socket cannot be opened
            raise DamagedFileError(path, "it is not a regular file") from None
        raise error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise DamagedFileError(path, "it is not a regular file")
    if limit is not None and found.st_size > limit:
        os.close(handle)
        raise DamagedFileError(path, f"it is larger than {limit / 2**20:g} MiB")
    return open(handle, "rb")


def read_bytes(path: Path, limit: int = SIZE) -> bytes:
    """Returns the content of a file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not a regular file, or is larger than `limit` bytes.
    """
    with open_regular(path, limit) as file:
        return file.read(limit)


def read_text(path: Path, limit: int = SIZE, encoding: str = "utf-8") -> str:
    """Returns the content of a text file; errors as of `read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, limit).decode(encoding)
    except UnicodeDecodeError:
        raise DamagedFileError(path, "it is not text in UTF-8") from None


def read_lines(path: Path, limit: int = LIST_SIZE) -> list[str]:
    """Returns the lines of a text file; errors as of `read_text`."""
    return read_text(path, limit, "utf-8-sig").splitlines()


# documents ----------------------------------------------------------------------------------------


def read_yaml(path: Path, aliases: int = 0) -> Any:
    """Returns the content of a YAML file.

    Args:
        path: the file.
        aliases: how many aliases it may have; files of ours have none.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it cannot be read, or holds other values than JSON does.
    """
    text, found = read_text(path), 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
            found += isinstance(event, yaml.AliasEvent)
            if found > aliases:
                raise DamagedFileError(path, "it has aliases")
            if number > NODES:
                raise DamagedFileError(path, f"it has more than {NODES} values")
        content = yaml.load(text, Loader=_Loader)
    except DamagedFileError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedFileError(path, _first_line(error)) from None
    _check_values(content, path)
    return content


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; errors as of `read_yaml`."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: the text.
        path: of its file, for messages.

    Raises:
        DamagedFileError: it cannot be read.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, _first_line(error)) from None
    _check_values(content, path)
    return content


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the lines of a file with a JSON value in each, and the values.

    A line that cannot be read is left out, as a killed process leaves one; a very long line ends
    the lines.

    Raises:
        DamagedFileError: it is not a regular file.
    """
    with open_regular(path) as file:
        while (line := file.readline(SIZE)) and len(line) < SIZE:
            try:
                text = line.decode()
                yield text, parse_json(text, path)
            except (UnicodeDecodeError, DamagedFileError):
                continue


def _check_values(value: Any, path: Path, depth: int = 0) -> None:
    if depth > DEPTH:  # also a value that holds itself
        raise DamagedFileError(path, f"it is nested more than {DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DamagedFileError(path, "it holds half a character") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DamagedFileError(path, f"the key {str(key)[:20]} is not a string")
            _check_values(key, path)
            _check_values(item, path, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, path, depth + 1)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise DamagedFileError(path, "it holds a number of more than 64 bits")
    elif value is not None and not isinstance(value, bool | int | float):
        raise DamagedFileError(path, f"{str(value)[:20]} is a {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# schemas ------------------------------------------------------------------------------------------


class Fields:
    """The keys of a mapping in a document, each read with its type.

    Args:
        content: the mapping.
        path: the file, for messages.
        prefix: of the keys in messages.

    Raises:
        DamagedFileError: it is not a mapping; and in every method, a key is missing or has another
            type.
    """

    def __init__(self, content: Any, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(content, dict):
            self._refuse("", "a mapping")
        self.content: dict[str, Any] = content

    def whole(self, key: str, default: int | None = None, low: int = 0, high: int = 2**62) -> int:
        """Returns a whole number from `low` to `high`; `default` if it is missing."""
        value = self.content.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        """Returns a number."""
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Returns a string; `default` if it is missing."""
        value = self.content.get(key, default)
        if not isinstance(value, str):
            self._refuse(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """Returns a list of strings."""
        value = self.content.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._refuse(key, "a list of strings")
        return value

    def numbers(self, key: str) -> dict[str, float]:
        """Returns a mapping from names to numbers; empty if it is missing.

        A name without a number, which stands for one that was not finite, is left out.
        """
        value = self.content.get(key) or {}
        if not isinstance(value, dict) or not all(
            item is None or (isinstance(item, int | float) and not isinstance(item, bool))
            for item in value.values()
        ):
            self._refuse(key, "a mapping from names to numbers")
        return {name: float(item) for name, item in value.items() if item is not None}

    def counts(self, key: str) -> dict[str, int]:
        """Returns a mapping from names to whole numbers; empty if it is missing."""
        inner = Fields(self.content.get(key) or {}, self.path, f"{self.prefix}{key}.")
        return {name: inner.whole(name) for name in inner.content}

    def inner(self, key: str) -> "Fields":
        """Returns a mapping."""
        return Fields(self.content.get(key), self.path, f"{self.prefix}{key}.")

    def hashes(self, key: str = "sha256") -> dict[str, str]:
        """Returns a mapping from files below the folder to their SHA-256; it is not empty."""
        value = self.content.get(key)
        if not isinstance(value, dict) or not value:
            self._refuse(key, "a mapping from files to hashes")
        for name, digest in value.items():
            parts = name.split("/")
            if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
                self._refuse(key, f"a mapping of files in the folder, and {name!r} is none")
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                self._refuse(f"{key}.{name}", "64 hexadecimal digits")
        return value

    def _refuse(self, key: str, wanted: str) -> NoReturn:
        name = f"{self.prefix}{key}".rstrip(".") or "its content"
        raise DamagedFileError(self.path, f"{name} must be {wanted}")
