"""What processes do for a preparation, a part or a shard at a time: each ends in one file, so what is done stays done."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from cosyexp.data import features
from cosyexp.data.cache import one_thread
from cosyexp.data.corpora.base import Recording
from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd
from cosyexp.data.shards import read_note, write_shard
from cosyexp.errors import UserError
from cosyexp.run.files import replace_file

GROUP = 8  # recordings that a front end is given at once
QUIET = 1e-3  # a peak below it (-60 dB) is silence
SHORTEST = 0.2  # seconds
PART = pa.schema(
    [
        *((name, pa.string()) for name in ("utt", "text", "speaker", "instruct", "fault")),
        ("path", pa.binary()),
        ("held_out", pa.bool_()),
        ("audio", pa.binary()),
        ("tokens", pa.list_(pa.int32())),
        ("embedding", pa.list_(pa.float32())),
        ("seconds", pa.float64()),
    ]
)


def check(recording: Recording) -> None:
    """ValueError where a recording cannot be used, whatever it sounds like."""
    if recording.fault:
        raise ValueError(recording.fault)
    for what in ("utt", "text", "speaker", "instruct"):
        value = getattr(recording, what)
        if not value.strip() and what != "instruct":
            raise ValueError(f"it has no {what}")
        if not value.isprintable() and any(
            "\ud800" <= character <= "\udfff" for character in value
        ):
            raise ValueError(f"its {what} is not UTF-8")


def listen(recording: Recording, longest: float) -> np.ndarray:
    """The wave at 16 kHz; ValueError where it is not fit for training."""
    audio = recording.read()
    wave = features.read_wave(audio, SAMPLE_RATE)
    seconds = len(wave) / SAMPLE_RATE
    if (promised := promised_seconds(audio)) > seconds + 0.1:
        raise ValueError(f"the audio is cut short: {seconds:.1f} s of {promised:.1f} s")
    if seconds > longest:
        raise ValueError(f"its audio of {seconds:.1f} s is longer than {longest:g} s")
    if seconds < SHORTEST:
        raise ValueError(f"its audio of {seconds:.2f} s is shorter than {SHORTEST:g} s")
    if (peak := float(np.abs(wave).max())) < QUIET:
        raise ValueError(f"the audio is silent (its peak is at {20 * np.log10(peak):.0f} dB)")
    return wave


def promised_seconds(audio: bytes) -> float:
    """How long the header says it is; the decoder itself takes what there is of a WAV, and corrects the header silently."""
    at = audio.find(b"data", 12, 4096) if audio[:4] == b"RIFF" else -1
    with soundfile.SoundFile(io.BytesIO(audio)) as file:
        if at < 0:
            return float(file.frames) / file.samplerate
        size = int.from_bytes(audio[at + 4 : at + 8], "little")
        held = len(audio) - at - 8
        streamed = (
            size >= 0xFFFFFF00 or size == 0
        )  # written to a pipe, by a program that could not know
        return (
            float(file.frames)
            / file.samplerate
            * (1.0 if streamed else max(size / max(held, 1), 1.0))
        )


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Recordings through the front ends. longest: seconds of a recording at most."""

    tokenizer: FrontEnd
    speaker: FrontEnd
    longest: float

    @one_thread()
    def __call__(self, path: Path, recordings: Sequence[Recording]) -> Path:
        """Writes what became of a part of the corpus, unless it is there already."""
        key = digest(
            [(replace(r, audio=None), None if r.audio else changed(r.path)) for r in recordings]
        )
        if read_key(path) == key:
            return path
        rows: list[dict[str, Any]] = []
        for start in range(0, len(recordings), GROUP):
            rows += self._group(recordings[start : start + GROUP])
        table = pa.Table.from_pylist(rows, schema=PART).replace_schema_metadata({"key": key})
        with replace_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return path

    def _group(self, recordings: Sequence[Recording]) -> list[dict[str, Any]]:
        rows, heard = [], []
        for recording in recordings:
            row = {
                key: value if not isinstance(value, str) else legible(value)
                for key, value in asdict(recording).items()
            }
            rows.append({**row, "path": os.fsencode(recording.path)})
            try:
                check(recording)
                heard.append(
                    (
                        rows[-1],
                        listen(
                            recording,
                            min(self.longest, self.tokenizer.longest, self.speaker.longest),
                        ),
                    )
                )
            except ValueError as error:
                rows[-1]["fault"] = legible(str(error))
        waves = [wave for _, wave in heard]
        for what, front_end in (("tokens", self.tokenizer), ("embedding", self.speaker)):
            for (row, _), value in zip(heard, each(front_end, waves), strict=True):
                row.update(
                    {"fault": row["fault"] or str(value)}
                    if isinstance(value, ValueError)
                    else {what: value}
                )
        for row, wave in heard:
            row["seconds"] = len(wave) / SAMPLE_RATE
            if not row["fault"] and not len(row["tokens"]):
                row["fault"] = "the tokenizer gives it no speech token"
        return rows


def each(front_end: FrontEnd, waves: Sequence[np.ndarray]) -> Iterator[Any]:
    """What a front end makes of each wave, or the ValueError that says why not."""
    try:
        yield from front_end.encode_all(waves)
        return
    except ValueError:
        pass  # of one of them
    for wave in waves:
        try:
            yield front_end.encode(wave)
        except ValueError as error:
            yield error


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """rows: of parts, as (part, row numbers). speakers: the mean embedding of each speaker who is heard in it."""

    target: Path
    rows: Sequence[tuple[Path, Sequence[int]]]
    speakers: Mapping[str, np.ndarray]


def write(job: ShardJob) -> Path:
    """Writes a shard, unless it is there already."""
    means = {speaker: mean.tobytes() for speaker, mean in job.speakers.items()}
    note = digest(
        [*((read_key(part), tuple(rows)) for part, rows in job.rows), *sorted(means.items())]
    )
    if has_note(job.target, note):
        return job.target
    rows = []
    for part, numbers in job.rows:
        table = read_part(part)
        rows += [
            shard_row(table.slice(number, 1).to_pylist()[0], job.speakers) for number in numbers
        ]
    write_shard(job.target, rows, note)
    return job.target


def shard_row(row: Mapping[str, Any], speakers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    path = os.fsdecode(row["path"])
    try:
        audio = row["audio"] or Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} could be read before, and cannot now ({error.strerror}): put it back, and repeat the command"
        ) from None
    return {
        "utt": row["utt"],
        "audio_data": audio,
        "wav": legible(path),
        "text": row["text"],
        "spk": row["speaker"],
        "utt_embedding": row["embedding"],
        "spk_embedding": speakers[row["speaker"]],
        "speech_token": row["tokens"],
        **({"instruct": row["instruct"]} if row["instruct"] else {}),
    }


def read_part(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def read_key(path: Path) -> str:
    """What a part was made of; empty where there is none."""
    try:
        with pa.memory_map(str(path)) as file:
            return str((pa.ipc.open_file(file).schema.metadata or {}).get(b"key", b"").decode())
    except (OSError, pa.ArrowInvalid):
        return ""


def has_note(path: Path, note: str) -> bool:
    try:
        return path.exists() and read_note(path) == note
    except UserError:
        return False


def changed(path: str) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def digest(content: object) -> str:
    return hashlib.blake2b(
        repr(content).encode("utf-8", "backslashreplace"), digest_size=16
    ).hexdigest()


def legible(text: str) -> str:
    """Text with bytes that were no UTF-8 written out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
