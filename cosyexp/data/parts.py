"""The parts of a preparation: a corpus is encoded into parts, and shards are made from their rows.

A part is an Arrow file with the columns of `encoding.PART`, for some consecutive recordings.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cosyexp.data.corpora.base import Corpus, Recording
from cosyexp.data.encoding import Encoder, ShardJob, digest, read_part
from cosyexp.data.prepared import SPLITS
from cosyexp.data.report import Report
from cosyexp.data.splits import Candidate, Split
from cosyexp.data.workers import Workers

log = logging.getLogger(__name__)

CHUNK = 64  # recordings in a part
MINUTE = 60.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
# The columns of a part except the audio.
COLUMNS = [
    "utt",
    "text",
    "speaker",
    "fault",
    "path",
    "held_out",
    "tokens",
    "embedding",
    "seconds",
]


def encode(
    encoder: Encoder, corpus: Corpus, total: int, folder: Path, workers: Workers
) -> list[Path]:
    """Encodes all recordings into the files of parts, with a progress bar.

    Args:
        encoder: the front ends.
        corpus: the recordings.
        total: number of recordings.
        folder: of the parts.
        workers: the processes that encode.

    Returns:
        The paths of the parts, in the order of the corpus.
    """

    def chunks() -> Iterator[tuple[Path, list[Recording]]]:
        recordings = once(corpus.recordings())
        number = 0
        while chunk := list(islice(recordings, CHUNK)):
            yield folder / f"{number:06d}.arrow", chunk
            number += 1

    parts, speed = [], Speed(total)
    with tqdm(total=total, desc="prepare", disable=None, bar_format=BAR) as bar:
        for part, is_new in workers.map(partial(apply, encoder), chunks()):
            table = read_part(part)
            parts.append(part)
            if is_new:
                speed.add(table["seconds"].to_pylist())
            else:  # its speed would be that of reading
                speed.total -= len(table)
            bar.set_postfix_str(str(speed), refresh=False)
            bar.update(len(table))
            if bar.disable and speed.is_due():  # a log file has no bar
                log.info("%s", speed)
    log.info("%s", speed)
    return parts


@dataclass
class Speed:
    """How fast recordings are encoded, without those that an earlier command encoded.

    Attributes:
        total: number of recordings to encode.
        done: number of those that are encoded.
        seconds: length of their audio.
        start: when the work began, on the monotonic clock.
        said: when the speed was last printed.
    """

    total: int
    done: int = 0
    seconds: float = 0.0
    start: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def add(self, seconds: Sequence[float | None]) -> None:
        """Adds recordings by their lengths."""
        self.done += len(seconds)
        self.seconds += sum(second or 0.0 for second in seconds)

    def is_due(self) -> bool:
        """Returns whether a minute has passed since it last was due."""
        now = time.monotonic()
        if now - self.said < MINUTE:
            return False
        self.said = now
        return True

    def __str__(self) -> str:
        passed = time.monotonic() - self.start
        left = passed / max(self.done, 1) * (self.total - self.done) / MINUTE
        return (
            f"{self.done} of {self.total} encoded, {self.done / passed:.1f} a second, "
            f"{self.seconds / passed:.0f} x real time, {left:.0f} min left"
        )


def apply(encoder: Encoder, job: tuple[Path, list[Recording]]) -> tuple[Path, bool]:
    """Encodes one part; a function of the module, so that it can be sent to a process.

    Returns:
        Its path, and whether it was encoded now, not by an earlier command.
    """
    return encoder(*job)


def once(recordings: Iterable[Recording]) -> Iterator[Recording]:
    """Yields the recordings, marking those with the id of an earlier one as faulty.

    Keeps a 64-bit hash of each id, about 100 bytes in a Python set.
    """
    seen: set[int] = set()
    for recording in recordings:
        key = int(digest(recording.utt)[:16], 16)
        yield (
            replace(recording, fault=recording.fault or "its id occurs twice")
            if key in seen
            else recording
        )
        seen.add(key)


def survey(
    parts: Iterable[Path], split: Split, out: Path
) -> tuple[Report, dict[str, np.ndarray], list[Candidate]]:
    """Reads all parts once for statistics.

    Args:
        parts: files of the parts.
        split: how utterances are chosen for validation.
        out: the folder, where `dropped.tsv` is written.

    Returns:
        The statistics; the mean embedding of each speaker by name, in alphabetical order; and what
        the split of each recording depends on.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    candidates = []
    with Report(out / "dropped.tsv") as report:
        for part in parts:
            for row in read_part(part).select(COLUMNS).to_pylist():
                report.add(row)
                candidates.append(split.candidate(row))
                if not row["fault"]:
                    embedding = np.array(row["embedding"], np.float64)
                    sums[row["speaker"]] = sums.get(row["speaker"], 0.0) + embedding
                    counts[row["speaker"]] = counts.get(row["speaker"], 0) + 1
    means = {
        speaker: (sums[speaker] / counts[speaker]).astype(np.float32) for speaker in sorted(sums)
    }
    return report, means, candidates


def jobs(
    parts: Iterable[Path],
    held_out: Iterable[bool],
    speakers: Mapping[str, np.ndarray],
    out: Path,
    size: int,
) -> Iterator[ShardJob]:
    """Yields the shards of both splits, in the order of the corpus.

    Args:
        parts: files of the parts.
        held_out: whether each recording is for validation.
        speakers: mean embedding of each speaker.
        out: the folder of the data set.
        size: usable utterances per shard; the last one of a split may have fewer.
    """
    rows: dict[str, list[tuple[Path, int, str]]] = {split: [] for split in SPLITS}
    count = dict.fromkeys(SPLITS, 0)

    def job(split: str) -> ShardJob:
        numbers: dict[Path, list[int]] = {}
        for part, number, _ in rows[split]:
            numbers.setdefault(part, []).append(number)
        means = {speaker: speakers[speaker] for *_, speaker in rows[split]}
        target = out / split / f"{count[split]:05d}.parquet"
        count[split] += 1
        rows[split].clear()
        return ShardJob(target=target, rows=list(numbers.items()), speakers=means)

    choices = iter(held_out)
    for part in parts:
        for number, row in enumerate(read_part(part).select(["fault", "speaker"]).to_pylist()):
            valid = next(choices)
            if not row["fault"]:
                split = SPLITS[valid]
                rows[split].append((part, number, row["speaker"]))
                if len(rows[split]) == size:
                    yield job(split)
    yield from (job(split) for split in SPLITS if rows[split])
