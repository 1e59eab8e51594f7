"""Gives damaged files to a reader, in forks that are watched for time and memory.

A reader may return, raise what the apps print as one line, or an error that its caller documents.
Anything else is a crash; so is a call of more than 5 seconds, or of 500 MB above the file's size.
"""

import logging
import mmap
import os
import random
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cosyexp.cli.errors import user_message
from tests.fuzz.mutate import mutated

HANG = 5.0  # seconds
MEMORY = 500 * 2**20  # bytes above what the process had, and the size of the file
MARGIN = 2.0  # times HANG: a shared machine is not always there, processor time counts


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file.

    Attributes:
        name: for the table.
        path: of an intact file, which is replaced by damaged ones.
        read: reads it.
        documented: errors that its callers expect, with the reason as the message.
        prepare: puts back what a call may have changed; called before each one.
    """

    name: str
    path: Path
    read: Callable[[], object]
    documented: tuple[type[Exception], ...] = ()
    prepare: Callable[[], object] | None = None


@dataclass
class Findings:
    """What became of the inputs of a reader: their number, and the crashes by their cause."""

    inputs: int = 0
    refused: int = 0
    crashes: dict[str, list[Path]] = field(default_factory=dict)


def fuzz(reader: Reader, seconds: float, seed: int, crashes: Path) -> Findings:
    """Gives damaged files to a reader for some seconds of wall time.

    Args:
        reader: what reads them.
        seconds: how long.
        seed: of the damages.
        crashes: folder for the inputs that crashed it.
    """
    content, findings = reader.path.read_bytes(), Findings()
    with suppress(Exception):  # imports what it needs, before the forks
        reader.read()
    limit = time.monotonic() + seconds
    with mmap.mmap(-1, 32) as shared:
        number = 0
        while time.monotonic() < limit and len(findings.crashes) < 20:
            number = _watch(reader, content, (number, seed), limit, shared, crashes, findings)
    reader.path.write_bytes(content)
    return findings


def _watch(
    reader: Reader,
    content: bytes,
    start: tuple[int, int],
    limit: float,
    shared: mmap.mmap,
    crashes: Path,
    findings: Findings,
) -> int:
    """Runs one fork until it crashes or time is up; returns the number of the next input."""
    shared[:32] = struct.pack("qqqd", start[0], 0, 0, time.monotonic())
    report = crashes.parent / "report.txt"
    report.write_text("")
    if (pid := os.fork()) == 0:
        _calls(reader, content, start, limit, shared, report)
    base, cause = _resident(pid), ""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        number, refused, size, began = struct.unpack("qqqd", shared[:32])
        if ended:
            code = os.waitstatus_to_exitcode(status)
            cause = report.read_text() if code == 1 else f"ended by {code}" if code else ""
            break
        if _resident(pid) > base + size + MEMORY:
            cause = "more than 500 MB"
        elif time.monotonic() - began > MARGIN * HANG:
            cause = "a hang"
        if cause:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    findings.inputs += number - start[0] + bool(cause)
    findings.refused += refused
    if cause:
        folder = crashes / reader.name.replace(" ", "_").replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"{number}-{reader.path.name}"
        kept.write_bytes(damaged(content, number, start[1]))
        kept.with_name(f"{kept.name}.txt").write_text(cause)
        findings.crashes.setdefault(cause.splitlines()[0], []).append(kept)
    return number + 1


def damaged(content: bytes, number: int, seed: int) -> bytes:
    """Returns the input of a number, the first of which is intact."""
    return mutated(content, random.Random(f"{seed}-{number}")) if number else content


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def _calls(
    reader: Reader,
    content: bytes,
    start: tuple[int, int],
    limit: float,
    shared: mmap.mmap,
    report: Path,
) -> None:
    """Calls the reader until it crashes or time is up, and ends this process."""
    signal.alarm(0)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    (number, seed), refused = start, 0
    try:
        while time.monotonic() < limit:
            damage = damaged(content, number, seed)
            if reader.prepare:
                reader.prepare()
            reader.path.write_bytes(damage)
            shared[:32] = struct.pack("qqqd", number, refused, len(damage), time.monotonic())
            try:
                reader.read()
            except reader.documented:
                refused += 1
            except Exception as error:
                refused += 1
                if (message := user_message(error)) is None:
                    raise
                if len(message.splitlines()) != 1:
                    raise AssertionError(f"not one line: {error!r}") from None
            number += 1
        shared[:32] = struct.pack("qqqd", number, refused, 0, time.monotonic())
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/cosyexp/" in f.filename] or frames[-1:]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        text = str(error).splitlines()[0][:100] if str(error) else ""
        report.write_text(
            f"{type(error).__name__} in {where}\n{text}\n{traceback.format_exc()[-6000:]}"
        )
        os._exit(1)
    os._exit(0)


def lines(reader: Reader, findings: Findings) -> list[str]:
    """Returns a line for each cause of a crash."""
    return [
        f"{reader.name}: {cause} ({len(paths)} times, such as {paths[0]})"
        for cause, paths in findings.crashes.items()
    ]
