"""The parts of a preparation: a corpus is encoded into parts, and shards are made from their rows.

A part is an Arrow file with the columns of `encoding.PART`, for some consecutive recordings.
"""

import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cosyexp.data.corpora.base import Corpus, Recording
from cosyexp.data.encoding import PART, Encoder, ShardJob, digest, read_part
from cosyexp.data.population import Population, Rules, Voice
from cosyexp.data.prepared import SPLITS
from cosyexp.data.quality_report import QualityReport
from cosyexp.data.report import Report
from cosyexp.data.splits import Split, text_key
from cosyexp.data.workers import Workers

log = logging.getLogger(__name__)

CHUNK = 64  # recordings in a part
MINUTE = 60.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
# The columns of a part except the audio.
COLUMNS = [name for name in PART.names if name not in ("audio", "instruct")]


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


@dataclass(frozen=True)
class Survey:
    """What the recordings are, and which of them are used.

    Attributes:
        report: statistics of the recordings.
        quality: their measures.
        speakers: mean embedding of each speaker by name, in alphabetical order.
        held_out: whether each recording is for validation; None: it is left out.
        leaks: number of recordings for training whose text is held out too.
    """

    report: Report
    quality: QualityReport
    speakers: dict[str, np.ndarray]
    held_out: list[bool | None]
    leaks: int


def survey(parts: Sequence[Path], split: Split, rules: Rules, out: Path) -> Survey:
    """Reads all parts twice: for what all recordings have in common, and to judge each of them.

    Args:
        parts: files of the parts.
        split: how utterances are chosen for validation.
        rules: which recordings are left out.
        out: the folder, where `dropped.tsv` and `quality.tsv` are written.
    """

    def rows(columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], bool]]:
        for part in parts:
            for row in read_part(part).select(columns).to_pylist():
                yield row, bool(split.planned(row["utt"], row["speaker"], row["held_out"]))

    population, voices = Population(), defaultdict[str, Voice](Voice)
    for row, planned in rows(["utt", "speaker", "held_out", "text", "fault", "embedding"]):
        if not row["fault"]:
            population.add(row, planned)
    candidates, texts = [], array("Q")
    with Report(out / "dropped.tsv") as report, QualityReport(out / "quality.tsv") as quality:
        for row, planned in rows(COLUMNS):
            row["unknown"] = rules.unknown_share(row["text"])
            if not row["fault"]:
                row.update(population.measures(row, planned))
                row["fault"] = rules.fault(row)
            chosen = bool(row["fault"]) or rules.filter(row)
            if not chosen:
                row["fault"] = rules.filter.reason(row)
            report.add(row, chosen=chosen)
            quality.add(row, chosen=chosen)
            candidates.append(split.candidate(row))
            texts.append(text_key(row["text"]))
            if not row["fault"]:
                voices[row["speaker"]].add(np.array(row["embedding"], np.float64))
    held_out = [
        valid if candidate.usable else None
        for valid, candidate in zip(split.choose(candidates), candidates, strict=True)
    ]
    unseen = {text for text, valid in zip(texts, held_out, strict=True) if valid}
    leaks = sum(
        valid is False and text in unseen for text, valid in zip(texts, held_out, strict=True)
    )
    speakers = {name: voices[name].mean.astype(np.float32) for name in sorted(voices)}
    return Survey(report, quality, speakers, held_out, leaks)


def jobs(
    parts: Iterable[Path],
    held_out: Iterable[bool | None],
    speakers: Mapping[str, np.ndarray],
    out: Path,
    size: int,
) -> Iterator[ShardJob]:
    """Yields the shards of both splits, in the order of the corpus.

    Args:
        parts: files of the parts.
        held_out: whether each recording is for validation; None: it is left out.
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
        for number, speaker in enumerate(read_part(part)["speaker"].to_pylist()):
            valid = next(choices)
            if valid is not None:
                split = SPLITS[valid]
                rows[split].append((part, number, speaker))
                if len(rows[split]) == size:
                    yield job(split)
    yield from (job(split) for split in SPLITS if rows[split])
