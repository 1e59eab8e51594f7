"""The parts of a preparation: a corpus is encoded into parts, and shards are made from their rows.

A part is an Arrow file with the columns of `encoding.PART`, for some consecutive recordings.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
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

CHUNK = 64  # recordings in a part
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

    parts, seconds, start = [], 0.0, time.monotonic()
    with tqdm(total=total, desc="prepare", unit="utt", disable=None) as bar:
        for part in workers.map(partial(apply, encoder), chunks()):
            table = read_part(part)
            seconds += sum(second or 0.0 for second in table["seconds"].to_pylist())
            bar.set_postfix_str(
                f"{seconds / 3600:.2f} h, {seconds / (time.monotonic() - start):.0f} x real time",
                refresh=False,
            )
            bar.update(len(table))
            parts.append(part)
    return parts


def apply(encoder: Encoder, job: tuple[Path, list[Recording]]) -> Path:
    """Encodes one part; a function of the module, so that it can be sent to a process."""
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
