"""Damages files: flips, cuts, splices and repeats bytes, and puts in values that break readers."""

import random
from collections.abc import Callable

TOKENS = [
    *(
        b"null",
        b"true",
        b"NaN",
        b".inf",
        b"-Infinity",
        b"~",
        b"''",
        b'""',
        b"{}",
        b"[]",
        b"0",
        b"-1",
    ),
    *(
        b"1e999",
        b"1.5",
        b"9" * 400,
        b"-9223372036854775809",
        b"18446744073709551616",
        b"4294967295",
    ),
    *(b"2020-13-45", b"0x1F", b"1_000", b"1:30:59", b"!!binary x", b"!!python/object:os.system a"),
    *(b"&a [*a, *a]", b"<<: *a", b"? - :", b"---\n...\n", b"%YAML 9.9\n", b"\t", b"\r", b"\n\n"),
    *(b"${oc.env:HOME}", b"???", b"../../x", b"/dev/zero", b"a" * 5000, b'"', b"'", b",", b"|"),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\\ud800",
        "é你\u202e\u2028".encode(),
    ),
    *(b"{" * 3000, b"[" * 3000, b'{"a":' * 2000, b"- " * 2000, b"&x *x", b"a: " * 500),
    *(value.to_bytes(size, "little") for size in (4, 8) for value in (0, 1, 2**31 - 1, 2**31)),
    *(b"\xff" * 4, b"\xff" * 8, (2**40).to_bytes(8, "little"), (2**63 - 1).to_bytes(8, "little")),
]

Mutation = Callable[[bytearray, random.Random], bytearray]


def place(content: bytearray, draw: random.Random) -> int:
    """Returns an index, often near the begin or the end, where headers are."""
    size = len(content)
    if not size:
        return 0
    return draw.choice(
        [
            draw.randrange(size),
            draw.randrange(min(size, 64)),
            draw.randrange(min(size, 1024)),
            size - 1 - draw.randrange(min(size, 256)),
        ]
    )


def flip(content: bytearray, draw: random.Random) -> bytearray:
    """Flips some bits."""
    for _ in range(draw.choice((1, 1, 2, 8, 64)) if content else 0):
        content[place(content, draw)] ^= 1 << draw.randrange(8)
    return content


def overwrite(content: bytearray, draw: random.Random) -> bytearray:
    """Writes a special value over what is there."""
    token, at = draw.choice(TOKENS), place(content, draw)
    content[at : at + len(token)] = token
    return content


def insert(content: bytearray, draw: random.Random) -> bytearray:
    """Puts in a special value."""
    at = place(content, draw)
    content[at:at] = draw.choice(TOKENS)
    return content


def value(content: bytearray, draw: random.Random) -> bytearray:
    """Replaces what stands between two separators of YAML, JSON or CSV."""
    ends = [i for i, byte in enumerate(content[:100_000]) if byte in b":,\n|[]{}"]
    if not ends:
        return insert(content, draw)
    begin = draw.randrange(len(ends))
    stop = ends[begin + 1] if begin + 1 < len(ends) else len(content)
    content[ends[begin] + 1 : stop] = b" " + draw.choice(TOKENS)
    return content


def truncate(content: bytearray, draw: random.Random) -> bytearray:
    """Leaves only the begin."""
    return content[: place(content, draw)]


def splice(content: bytearray, draw: random.Random) -> bytearray:
    """Copies a part to another place."""
    begin, at = place(content, draw), place(content, draw)
    part = content[begin : begin + draw.choice((1, 4, 16, 256, 4096))]
    content[at : at + draw.choice((0, len(part)))] = part
    return content


def duplicate(content: bytearray, draw: random.Random) -> bytearray:
    """Repeats a line, or everything."""
    if draw.random() < 0.2:
        return content * 2
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    return bytearray(b"\n").join([*lines[:at], *[lines[at]] * draw.choice((2, 20)), *lines[at:]])


def remove(content: bytearray, draw: random.Random) -> bytearray:
    """Takes out a part."""
    at = place(content, draw)
    del content[at : at + draw.choice((1, 2, 8, 100, 1000))]
    return content


MUTATIONS: list[Mutation] = [
    *(flip, overwrite, insert, value, value, truncate, splice, duplicate, remove)
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Returns a damaged copy of a file's content."""
    copy = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        copy = draw.choice(MUTATIONS)(copy, draw)
    return bytes(copy)
