"""What the first pass of F0 and the refusal of long recordings cost, as ratios within one run.

Usage: python benchmarks/prepare.py [folder of recordings]

F0: the original runs harvest on one segment of each utterance in every epoch. We compute F0 of the
whole utterance once, so the first pass is compared with one such epoch, in CPU seconds of one
thread. The agreement is that with harvest on the whole utterance: of voicing in all frames, and in
those within 35 dB of the loudest; and the share of voiced loud frames whose F0 is 20 % off. Harvest
on a segment does not agree with itself on the whole either: it is in the table for comparison.

Long recordings: the time in which a file of half an hour is refused, and its minute 29 is cut out,
relative to decoding the file. Without a folder the recordings are the demo's.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from cosyexp.cli.compose import compose_train
from cosyexp.data.audio import decode, open_audio
from cosyexp.data.corpora.base import Recording
from cosyexp.data.corpora.names import is_audio
from cosyexp.data.encoding import listen
from cosyexp.data.features import pitch, read_wave
from cosyexp.data.shards import read_list, read_rows

UTTERANCES = 24
RATE, HOP, SEGMENT = 22050, 256, 24576  # of family=cosyvoice
LOUD = 35  # dB below the loudest frame
ORIGINAL = "harvest, segments (original)"
METHODS = {ORIGINAL: "harvest", "harvest": "harvest", "fast": "fast", "dio": "dio"}


def waves(folder: str | None) -> Iterator[np.ndarray]:
    """Yields some recordings, spread evenly over a folder."""
    if folder is None:
        config = compose_train(["model=hifigan"])
        rows = (
            row
            for shard in read_list(str(config.data.train))
            for row in read_rows(shard, ["utt", "audio_data"])
        )
        yield from (read_wave(row["audio_data"], RATE) for row in islice(rows, UTTERANCES))
        return
    files = sorted(str(path) for path in Path(folder).rglob("*") if is_audio(path.name))
    for file in files[:: max(len(files) // UTTERANCES, 1)][:UTTERANCES]:
        yield read_wave(file, RATE)


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Returns CPU seconds and the result."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def loudness(wave: np.ndarray, frames: int) -> np.ndarray:
    """Returns which frames are loud, (frames,)."""
    power = np.square(wave[: frames * HOP]).reshape(frames, HOP).mean(axis=1)
    return power > power.max() * 10 ** (-LOUD / 10)


def compare_f0(folder: str | None) -> None:
    """Prints time and agreement of the methods of F0."""
    cost = dict.fromkeys(METHODS, 0.0)
    sums: dict[str, np.ndarray] = {}
    for wave in waves(folder):
        start = max(len(wave) - SEGMENT, 0) // 2 // HOP
        segment = wave[start * HOP :][:SEGMENT]
        found: dict[str, np.ndarray] = {}
        for name, method in METHODS.items():
            heard = segment if name == ORIGINAL else wave
            seconds, found[name] = timed(pitch, heard, RATE, HOP, method)
            cost[name] += seconds
        loud = loudness(wave, len(wave) // HOP)
        for name, f0 in found.items():
            part = slice(start, start + len(f0)) if name == ORIGINAL else slice(None)
            true, where = found["harvest"][part], loud[part]
            same = (f0 > 0) == (true > 0)
            both = (f0 > 0) & (true > 0) & where
            wrong = np.abs(f0[both] / true[both] - 1) > 0.2
            counts = [len(f0), same.sum(), where.sum(), same[where].sum(), both.sum(), wrong.sum()]
            sums[name] = sums.get(name, 0) + np.array(counts, np.float64)
    print(f"{'F0':28} {'first pass : epoch':>18} {'voicing':>8} {'loud':>6} {'20 % off':>9}")
    for name in METHODS:
        frames, same, loud_frames, same_loud, voiced, wrong = sums[name]
        print(
            f"{name:28} {cost[name] / cost[ORIGINAL]:18.2f} {same / frames:8.3f} "
            f"{same_loud / loud_frames:6.3f} {wrong / voiced:9.3f}"
        )


def whole(audio: bytes) -> None:
    """Decodes a file."""
    with open_audio(io.BytesIO(audio)) as opened:
        decode(opened)


def refused(audio: bytes) -> None:
    """Tries a file that is too long."""
    try:
        listen(Recording(utt="a", text="a", speaker="a", path="", audio=audio), 30.0)
    except ValueError:
        return
    raise AssertionError


def part(audio: bytes) -> None:
    """Reads ten seconds of minute 29."""
    start = 29 * 60.0
    recording = Recording(
        utt="a", text="a", speaker="a", path="", audio=audio, start=start, end=start + 10
    )
    listen(recording, 30.0)


def refuse_long(folder: str | None) -> None:
    """Prints how long it takes to refuse half an hour of audio, and to cut out a part."""
    wave = np.concatenate(list(waves(folder)))
    wave = np.resize(wave, 30 * 60 * RATE)
    print(
        f"\n{'half an hour':28} {'refused : decoded':>18} {'cut : decoded':>14} {'refused, ms':>12}"
    )
    for form in ("WAV", "FLAC", "MP3", "OGG"):
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", RATE, 1, format=form) as writer:
            for start in range(0, len(wave), RATE):  # libsndfile cannot write all of an OGG at once
                writer.write(wave[start : start + RATE])
        audio = file.getvalue()

        all_of_it, nothing, some = (timed(run, audio)[0] for run in (whole, refused, part))
        print(
            f"{form:28} {nothing / all_of_it:18.4f} {some / all_of_it:14.3f} {1000 * nothing:12.2f}"
        )


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else None
    compare_f0(given)
    refuse_long(given)
