"""Audio files: their headers, which tell most faults, before their samples. S samples, C channels.

A file is decoded in blocks and no further than the longest recording, whatever its header says.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

import numpy as np
import soundfile

BLOCK = 2**18  # samples that are decoded at a time
UNKNOWN = 2**62  # samples in the header of a FLAC file that was written to a pipe
SLACK = 0.1  # seconds that a file may have less than its header says
STREAMED = 0xFFFFFF00  # bytes from which on the header of a WAV file does not know its size


class Stream(soundfile.SoundFile):  # type: ignore[misc]
    """An audio file that is read from its beginning to its end.

    soundfile seeks after each block of a seekable file, which fails in one of unknown length.
    """

    def seekable(self) -> bool:
        """Returns that the file is only read forward."""
        return False


@contextmanager
def open_audio(file: BinaryIO | str) -> Iterator[Stream]:
    """Opens an audio file, and reads its header.

    Raises:
        ValueError: in the block too, if the file cannot be decoded.
    """
    try:
        with Stream(file) as audio:
            yield audio
    except (soundfile.SoundFileError, OSError) as error:
        reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
        raise ValueError(f"the audio cannot be decoded ({reason})") from None


def decode(audio: Stream, longest: float = math.inf) -> np.ndarray:
    """Decodes what is left of an audio file.

    Args:
        audio: the open file.
        longest: maximum length in seconds.

    Returns:
        (S, C) float32.

    Raises:
        ValueError: if the audio is longer; where the header knows the length, nothing is decoded.
    """
    rate, declared = audio.samplerate, audio.frames
    if declared < UNKNOWN and declared > longest * rate:
        raise ValueError(f"the audio of {declared / rate:.1f} s is longer than {longest:g} s")
    blocks, count = [np.empty((0, audio.channels), np.float32)], 0
    while len(block := audio.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
        count += len(block)
        if count > longest * rate:
            raise ValueError(f"the audio is longer than {longest:g} s")
    return np.concatenate(blocks)


def cut(file: BinaryIO, start: float, end: float | None, longest: float) -> bytes:
    """Returns a part of an audio file as a WAV file, without decoding the rest.

    Args:
        file: the open file.
        start: where the part begins, in seconds.
        end: where it ends; None: at the end of the file.
        longest: maximum length of the part in seconds.

    Raises:
        ValueError: if the file cannot be decoded, the part is not in it, or it is too long.
    """
    with open_audio(file) as audio:
        rate, total = audio.samplerate, audio.frames
        first, last = round(start * rate), total if end is None else round(end * rate)
        if not 0 <= first < last <= total + SLACK * rate:
            span = f"{start:g} to {'its end' if end is None else f'{end:g}'} s"
            raise ValueError(f"the part from {span} is not in the audio of {total / rate:.1f} s")
        if last - first > longest * rate:
            raise ValueError(
                f"the part of {(last - first) / rate:.1f} s is longer than {longest:g} s"
            )
        audio.seek(first)
        samples = audio.read(min(last, total) - first, dtype="int16", always_2d=True)
    part = io.BytesIO()
    soundfile.write(part, samples, rate, format="WAV", subtype="PCM_16")
    return part.getvalue()


def check_complete(file: BinaryIO, audio: Stream, decoded: int) -> None:
    """Checks that an audio file is as long as its header says.

    libsndfile corrects the sizes of WAV and AIFF files silently, and the length of an OGG file is
    that of its last page, so these are read here.

    Args:
        file: the file, which is moved.
        audio: the same file, open.
        decoded: number of samples that were decoded.

    Raises:
        ValueError: if it is shorter, or has more samples than its header says.
    """
    seconds, declared = decoded / audio.samplerate, float(decoded)
    if audio.frames < UNKNOWN:
        declared = max(declared, audio.frames)
    magic = _at(file, 0, 4)
    if magic in (b"RIFF", b"RIFX", b"FORM"):
        declared *= _declared_share(file, "little" if magic == b"RIFF" else "big")
    promised = declared / audio.samplerate
    if promised > seconds + SLACK:
        raise ValueError(f"the audio is cut short: {seconds:.1f} s of {promised:.1f} s")
    if promised < seconds - SLACK:
        raise ValueError("the audio goes on after the end that its header gives")
    if magic == b"OggS" and not _ogg_ends(file):
        raise ValueError(
            f"the audio is cut short: it ends after {seconds:.1f} s without a last page"
        )


def _at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _declared_share(file: BinaryIO, order: Literal["little", "big"]) -> float:
    """Returns the declared bytes of samples of a WAV or AIFF file, in units of those it has.

    1: as many, or the header does not know; above: the file is cut short; below: what follows the
    samples is not another chunk but more samples.
    """
    total, position = file.seek(0, os.SEEK_END), 12
    while len(header := _at(file, position, 8)) == 8:
        size = int.from_bytes(header[4:], order)
        if header[:4] in (b"data", b"SSND"):
            break
        position += 8 + size + size % 2
    else:
        return 1.0
    held = total - position - 8
    if size == 0 or size >= STREAMED or held <= 0:
        return 1.0
    for padding in (0, size % 2):
        name = _at(file, position + 8 + size + padding, 4)
        is_name = all(32 <= byte < 127 for byte in name) or not any(name)
        if size < held and is_name:
            return 1.0  # another chunk, zeros, or nothing
    return size / held


def _ogg_ends(file: BinaryIO) -> bool:
    """Returns whether the last page of an OGG file is complete and marked as the last."""
    total = file.seek(0, os.SEEK_END)
    tail = _at(file, max(total - 2**17, 0), 2**17)  # a page has less than 64 KiB
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    if len(page) < 27 or not page[5] & 4:
        return False
    lacing = page[27 : 27 + page[26]]
    return len(page) >= 27 + page[26] + sum(lacing)
