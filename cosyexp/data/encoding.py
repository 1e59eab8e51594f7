"""The work of a preparation that runs in processes: encoding a part of the corpus, writing a shard.

Each piece of work ends in one file that records what it was made from, so that an interrupted
preparation does not repeat what is done. S samples.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cosyexp.data import features
from cosyexp.data.arrow import open_arrow
from cosyexp.data.audio import check_complete, decode, open_audio
from cosyexp.data.cache import one_thread
from cosyexp.data.corpora.base import AUDIO_SIZE, Recording
from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd
from cosyexp.data.quality import OF_AUDIO
from cosyexp.data.shards import read_note, write_shard
from cosyexp.data.treatment import Sound, Treatment
from cosyexp.errors import UserError
from cosyexp.run.documents import DamagedFileError, read_bytes
from cosyexp.run.files import replace_file

GROUP = 8  # recordings that a front end encodes at a time
QUIET = 1e-3  # a peak below this (-60 dB) is silence
SHORTEST = 0.2  # seconds
PART = pa.schema(
    [
        *((name, pa.string()) for name in ("utt", "text", "speaker", "instruct", "fault")),
        ("path", pa.binary()),
        ("held_out", pa.bool_()),
        ("audio", pa.binary()),
        ("tokens", pa.list_(pa.int32())),
        ("embedding", pa.list_(pa.float32())),
        *((name, pa.float64()) for name in ("seconds", *OF_AUDIO)),
        ("heard", pa.string()),
    ]
)


def check(recording: Recording, transcribed: bool = False) -> None:
    """Checks everything of a recording but its audio.

    Args:
        recording: a file, or a part of one.
        transcribed: whether it need not have a text.

    Raises:
        ValueError: if the corpus found a fault, a value is missing, or one is not UTF-8.
    """
    if recording.fault:
        raise ValueError(recording.fault)
    for name in ("utt", "text", "speaker", "instruct"):
        value = getattr(recording, name)
        optional = name == "instruct" or (name == "text" and transcribed)
        if not value.strip() and not optional:
            raise ValueError(f"it has no {name}")
        if not value.isprintable() and any(
            "\ud800" <= character <= "\udfff" for character in value
        ):
            raise ValueError(f"the {name} is not UTF-8")


def listen(recording: Recording, longest: float) -> Sound:
    """Decodes the audio of a recording.

    Args:
        recording: a file, or a part of one.
        longest: maximum length in seconds; no more is decoded.

    Raises:
        ValueError: if the audio is not fit for training.
    """
    audio = None if recording.is_file else recording.read(longest)
    opened = recording.open() if audio is None else io.BytesIO(audio)
    with opened as file, open_audio(file) as source:
        features.check_rate(source.samplerate)
        samples = decode(source, longest)
        if file.seek(0, os.SEEK_END) > AUDIO_SIZE:  # it would go into a shard whole
            raise ValueError(f"the audio file is larger than {AUDIO_SIZE / 2**20:g} MiB")
        check_complete(file, source, len(samples))
        wave = features.mono(samples, source.samplerate, SAMPLE_RATE)
    seconds = len(wave) / SAMPLE_RATE
    if seconds < SHORTEST:
        raise ValueError(f"the audio of {seconds:.2f} s is shorter than {SHORTEST:g} s")
    if (peak := float(np.abs(wave).max())) < QUIET:
        raise ValueError(f"the audio is silent (its peak is at {20 * np.log10(peak):.0f} dB)")
    return Sound(wave, audio, samples, source.samplerate)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes recordings as speech tokens and speaker embeddings.

    Attributes:
        tokenizer: front end of the speech tokens.
        speaker: front end of the speaker embeddings.
        longest: maximum length of a recording in seconds.
        treatment: what is done to recordings first.
    """

    tokenizer: FrontEnd
    speaker: FrontEnd
    longest: float
    treatment: Treatment = field(default_factory=Treatment)

    @one_thread()
    def __call__(self, path: Path, recordings: Sequence[Recording]) -> tuple[Path, bool]:
        """Encodes a part of the corpus into a file, unless the file exists and is up to date.

        Args:
            path: of the Arrow file, with the columns of `PART`.
            recordings: of the part.

        Returns:
            The path, and whether the part was encoded now.
        """
        key = digest([(replace(r, audio=None), changed(r.path)) for r in recordings])
        if read_key(path) == key:
            return path, False
        rows: list[dict[str, Any]] = []
        for start in range(0, len(recordings), GROUP):
            rows += self._group(recordings[start : start + GROUP])
        table = pa.Table.from_pylist(rows, schema=PART).replace_schema_metadata({"key": key})
        with replace_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return path, True

    def _group(self, recordings: Sequence[Recording]) -> list[dict[str, Any]]:
        longest = min(self.longest, self.tokenizer.longest, self.speaker.longest)
        rows, usable = [], []
        for recording in recordings:
            rows.append(row := row_of(recording))
            try:
                check(recording, transcribed=self.treatment.transcribe is not None)
                sound = listen(recording, longest)
                row.update(self.treatment.describe(row["text"], sound))
                sound = self.treatment.sound(sound)
                row["audio"] = sound.audio
                usable.append((row, sound.speech_S))
            except ValueError as error:
                row["fault"] = legible(str(error))
        waves = [wave for _, wave in usable]
        for column, front_end in (("tokens", self.tokenizer), ("embedding", self.speaker)):
            for (row, _), value in zip(usable, each(front_end, waves), strict=True):
                row.update(
                    {"fault": row["fault"] or str(value)}
                    if isinstance(value, ValueError)
                    else {column: value}
                )
        for row, wave in usable:
            row["seconds"] = len(wave) / SAMPLE_RATE
            if not row["fault"] and not len(row["tokens"]):
                row["fault"] = "the speech tokenizer gives no token for it"
        return rows


def row_of(recording: Recording) -> dict[str, Any]:
    """Returns the row of a recording in a part, without what is computed."""
    row = {
        key: value if not isinstance(value, str) else legible(value)
        for key, value in asdict(replace(recording, audio=None)).items()
    }
    return {**row, "path": os.fsencode(recording.path)}


def each(front_end: FrontEnd, waves: Sequence[np.ndarray]) -> Iterator[Any]:
    """Yields what a front end gives for each waveform, or the ValueError that it raises for it."""
    try:
        yield from front_end.encode_all(waves)
        return
    except ValueError:
        pass  # one of them fails: find out which
    for wave in waves:
        try:
            yield front_end.encode(wave)
        except ValueError as error:
            yield error


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A shard to write.

    Attributes:
        target: path of the parquet file.
        rows: part files and the numbers of their rows that go into the shard.
        speakers: mean embedding of each speaker in the shard.
    """

    target: Path
    rows: Sequence[tuple[Path, Sequence[int]]]
    speakers: Mapping[str, np.ndarray]


def write(job: ShardJob) -> Path:
    """Writes a shard, unless it exists and is up to date, and returns its path."""
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
    """Converts a row of a part to a row of a shard, and reads its audio file.

    Args:
        row: values by the columns of `PART`.
        speakers: mean embedding of each speaker.

    Raises:
        UserError: if the audio file can no longer be read.
    """
    return {
        "utt": row["utt"],
        "audio_data": audio_of(row),
        "wav": legible(os.fsdecode(row["path"])),
        "text": row["text"],
        "spk": row["speaker"],
        "utt_embedding": row["embedding"],
        "spk_embedding": speakers[row["speaker"]],
        "speech_token": row["tokens"],
        **({"instruct": row["instruct"]} if row["instruct"] else {}),
    }


def audio_of(row: Mapping[str, Any]) -> bytes:
    """Returns the bytes of the audio file of a row of a part.

    Raises:
        UserError: if the file can no longer be read.
    """
    path = os.fsdecode(row["path"])
    try:
        audio: bytes = row["audio"] or read_bytes(Path(path), AUDIO_SIZE)
    except OSError as error:
        raise UserError(
            f"{path} can no longer be read ({error.strerror}): restore it, and repeat the command"
        ) from None
    return audio


def read_part(path: Path) -> pa.Table:
    """Memory-maps a part of the corpus, with the columns of `PART`."""
    with open_arrow(path) as reader:
        return reader.read_all()


def read_key(path: Path) -> str:
    """Returns the hash of what a part was made from; empty if there is no readable part."""
    try:
        with open_arrow(path) as reader:
            return str((reader.schema.metadata or {}).get(b"key", b"").decode())
    except (OSError, pa.ArrowException, DamagedFileError, UnicodeDecodeError):
        return ""


def has_note(path: Path, note: str) -> bool:
    """Returns whether a shard exists and was written with this note."""
    try:
        return path.exists() and read_note(path) == note
    except UserError:
        return False


def changed(path: str) -> tuple[int, int]:
    """Returns size and modification time of a file, which change when it does; 0, 0 without one."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def digest(content: object) -> str:
    """Returns a hash of the `repr` of some content."""
    return hashlib.blake2b(
        repr(content).encode("utf-8", "backslashreplace"), digest_size=16
    ).hexdigest()


def legible(text: str) -> str:
    """Replaces lone surrogates, which stand for bytes that are not UTF-8, by escape sequences."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
