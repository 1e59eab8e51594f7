"""From recordings to a data set: parquet shards, their lists, and the front ends that made them.

<out>/train/00000.parquet ...  train.list      valid/..., valid.list
      speech_tokenizer.safetensors  speaker_encoder.safetensors     what was fitted on the training split, kept for new speech
      speakers.safetensors                                          the mean embedding of each speaker
      dropped.tsv  lengths.png                                      what was left out and why; how long the utterances are
      meta.yaml                                                     written last: a folder without it is not prepared
      preparing.yaml  parts/                                        of a preparation that is under way
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from cosyexp.config import FamilyConfig
from cosyexp.data.cache import ensure
from cosyexp.data.corpora.base import Corpus, Recording
from cosyexp.data.encoding import Encoder, ShardJob, check, digest, listen, read_part, write
from cosyexp.data.fields import F0, Field, Mel, Wave
from cosyexp.data.frontends.base import FrontEnd, Recipe, Wanted
from cosyexp.data.frontends.kmeans import KMeans
from cosyexp.data.frontends.mel_speaker import MelStatistics
from cosyexp.data.report import Report
from cosyexp.data.shards import read_list, write_list
from cosyexp.data.workers import Workers
from cosyexp.errors import UserError
from cosyexp.registry import build
from cosyexp.run.files import replacement, write_text
from cosyexp.run.tensors import save_tensors

log = logging.getLogger(__name__)
META, BEGUN, PARTS = "meta.yaml", "preparing.yaml", "parts"
SPLITS = ("train", "valid")
CHUNK = 64  # recordings of a part
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
]  # all but the audio


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Wanted):
    """shard_size: utterances in a parquet file. fit_on: recordings at most that the front ends are fitted on.

    max_seconds: of a recording. processes: at work side by side. max_bad: the share of recordings that may be unusable.
    """

    tokenizer: Recipe = field(default_factory=KMeans)
    speaker: Recipe = field(default_factory=MelStatistics)
    shard_size: int = 200
    fit_on: int = 2000
    max_seconds: float = 30.0
    processes: int = 2
    max_bad: float = 0.05


def prepare(
    corpus: Corpus,
    out: Path,
    options: PrepareOptions,
    settings: Mapping[str, Any],
    unknown: Callable[[str], Iterable[str]] = lambda text: (),
) -> dict[str, Any]:
    """Writes the data set and returns what `meta.yaml` holds; a folder prepared with the same `settings` is left alone.

    unknown: the characters of a text that the family's tokenizer does not know.
    """
    if (done := prepared(out)) is not None:
        if done["settings"] != settings:
            raise UserError(
                f"{out} holds a data set of other settings: give another out=, or remove that folder"
            )
        tidy(out)
        return done
    if (total := len(corpus)) == 0:
        raise UserError("the corpus holds no recording: look at its path")
    encoder = front_ends(corpus, out, options, settings)
    log.info("preparing %d recordings in %s, once", total, out)
    try:
        with Workers(options.processes) as workers:
            parts = encode(encoder, corpus, total, out / PARTS, workers)
            report, speakers = survey(parts, out)
            refuse_too_many(report, options.max_bad, out)
            shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
            for path in workers.map(write, jobs(parts, speakers, out, options.shard_size)):
                shards[path.parent.name].append(path)
    except BrokenProcessPool:
        raise UserError(
            "a process ended before its work (out of memory?): repeat the command, perhaps with fewer processes="
        ) from None
    for split in SPLITS:
        write_list(out / f"{split}.list", shards[split])
        if not shards[split]:
            log.warning("no utterance is left for %s.list", split)
    with replacement(out / "speakers.safetensors") as part:
        save_tensors(part, {name: torch.from_numpy(mean) for name, mean in speakers.items()})
    report.draw(out / "lengths.png", options.token_rate)
    meta = {"settings": dict(settings), **report.summary(unknown), "speakers": list(speakers)}
    write_text(out / META, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))
    tidy(out)
    return meta


def tidy(out: Path) -> None:
    """Removes what only a preparation under way needs."""
    (out / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)


def prepared(out: Path) -> dict[str, Any] | None:
    """What `meta.yaml` says of a prepared folder; None where it is not (wholly) prepared."""
    try:
        meta = yaml.safe_load((out / META).read_text())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        meta = None
    if not isinstance(meta, dict) or "settings" not in meta:
        raise UserError(
            f"{out}/{META} is not what prepare wrote: remove {out}, and prepare it again"
        )
    return meta


def front_ends(
    corpus: Corpus, out: Path, options: PrepareOptions, settings: Mapping[str, Any]
) -> Encoder:
    """Fits them on the first recordings of the training split, or takes those of a preparation that was interrupted."""
    begun = yaml.safe_dump({"settings": dict(settings)}, sort_keys=False)
    resumed = (out / BEGUN).exists()
    if resumed and (out / BEGUN).read_text() != begun:
        raise UserError(
            f"{out} holds the beginning of a data set of other settings: give another out=, or remove that folder"
        )
    waves = Waves(corpus, options)
    ready: list[FrontEnd] = []
    for recipe, what, path in (
        (options.tokenizer, "speech tokens", out / "speech_tokenizer.safetensors"),
        (options.speaker, "speaker embeddings", out / "speaker_encoder.safetensors"),
    ):
        try:
            ready.append(
                recipe.load(path, options)
                if resumed and path.exists()
                else recipe.fit(waves, options)
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"the {what} cannot be fitted: {error}; take fewer, or more speech"
            ) from None
    write_text(out / BEGUN, begun)
    for front_end, name in zip(ready, ("speech_tokenizer", "speaker_encoder"), strict=True):
        front_end.save(out / f"{name}.safetensors")
    return Encoder(tokenizer=ready[0], speaker=ready[1], longest=options.max_seconds)


class Waves:
    """The first usable recordings of the training split, read anew whenever they are gone through."""

    def __init__(self, corpus: Corpus, options: PrepareOptions) -> None:
        self.corpus, self.options = corpus, options

    def __iter__(self) -> Iterator[np.ndarray]:
        heard = 0
        for recording in islice(
            (r for r in self.corpus.recordings() if not r.held_out), self.options.fit_on
        ):
            try:
                check(recording)
                wave = listen(recording, self.options.max_seconds)
            except ValueError:
                continue  # it is named when it is encoded
            heard += 1
            yield wave
        if not heard:
            raise UserError(
                "none of the first recordings can be used as audio: look at the corpus's path"
            )


def encode(
    encoder: Encoder, corpus: Corpus, total: int, folder: Path, workers: Workers
) -> list[Path]:
    """Every recording through the front ends, into parts."""

    def chunks() -> Iterator[tuple[Path, list[Recording]]]:
        recordings = once(corpus.recordings())
        number = 0
        while chunk := list(islice(recordings, CHUNK)):
            yield folder / f"{number:06d}.arrow", chunk
            number += 1

    parts, seconds, began = [], 0.0, time.monotonic()
    with tqdm(total=total, desc="prepare", unit="utt", disable=None) as bar:
        for part in workers.map(partial(apply, encoder), chunks()):
            table = read_part(part)
            seconds += sum(second or 0.0 for second in table["seconds"].to_pylist())
            bar.set_postfix_str(
                f"{seconds / 3600:.2f} h, {seconds / (time.monotonic() - began):.0f} hours an hour",
                refresh=False,
            )
            bar.update(len(table))
            parts.append(part)
    return parts


def apply(encoder: Encoder, job: tuple[Path, list[Recording]]) -> Path:
    return encoder(*job)


def once(recordings: Iterable[Recording]) -> Iterator[Recording]:
    """An id that occurs again is a fault of the later one. A 64-bit hash of each is kept: some 100 bytes in Python's set."""
    seen: set[int] = set()
    for recording in recordings:
        key = int(digest(recording.utt)[:16], 16)
        yield (
            replace(recording, fault=recording.fault or "its id occurs twice")
            if key in seen
            else recording
        )
        seen.add(key)


def survey(parts: Iterable[Path], out: Path) -> tuple[Report, dict[str, np.ndarray]]:
    """Goes through all parts once: what is there, what is left out, and the mean embedding of each speaker."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    with Report(out / "dropped.tsv") as report:
        for part in parts:
            for row in read_part(part).select(COLUMNS).to_pylist():
                report.add(row)
                if not row["fault"]:
                    embedding = np.array(row["embedding"], np.float64)
                    sums[row["speaker"]] = sums.get(row["speaker"], 0.0) + embedding
                    counts[row["speaker"]] = counts.get(row["speaker"], 0) + 1
    return report, {
        speaker: (sums[speaker] / counts[speaker]).astype(np.float32) for speaker in sorted(sums)
    }


def refuse_too_many(report: Report, max_bad: float, out: Path) -> None:
    if report.dropped:
        log.warning(
            "%d of %d recordings left out: %s",
            report.dropped,
            report.total,
            report.some(f"{out}/dropped.tsv"),
        )
    if report.dropped > max_bad * report.total or report.dropped == report.total:
        raise UserError(
            f"{report.dropped} of {report.total} recordings cannot be used, more than max_bad={max_bad} allows; "
            f"the first is {report.first}, {out}/dropped.tsv names all"
        )


def jobs(
    parts: Iterable[Path], speakers: Mapping[str, np.ndarray], out: Path, size: int
) -> Iterator[ShardJob]:
    """The shards of both splits, each of `size` usable utterances, in their order."""
    rows: dict[str, list[tuple[Path, int, str]]] = {split: [] for split in SPLITS}
    count = dict.fromkeys(SPLITS, 0)

    def job(split: str) -> ShardJob:
        places: dict[Path, list[int]] = {}
        for part, number, _ in rows[split]:
            places.setdefault(part, []).append(number)
        heard = {speaker: speakers[speaker] for *_, speaker in rows[split]}
        target = out / split / f"{count[split]:05d}.parquet"
        count[split] += 1
        rows[split].clear()
        return ShardJob(target=target, rows=list(places.items()), speakers=heard)

    for part in parts:
        for number, row in enumerate(
            read_part(part).select(["fault", "held_out", "speaker"]).to_pylist()
        ):
            if not row["fault"]:
                split = SPLITS[row["held_out"]]
                rows[split].append((part, number, row["speaker"]))
                if len(rows[split]) == size:
                    yield job(split)
    yield from (job(split) for split in SPLITS if rows[split])


def prepare_corpus(
    corpus: Mapping[str, Any],
    family: FamilyConfig,
    out: Path,
    speech_tokenizer: Recipe | None = None,
    speaker_encoder: Recipe | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Prepares a corpus as a family reads it; see `prepare`.

    Args:
        corpus: config node.
        options: see `PrepareOptions`.
    """
    tokenizer, speaker = speech_tokenizer or KMeans(), speaker_encoder or MelStatistics()
    wanted = PrepareOptions(
        token_rate=family.token_rate,
        codes=family.speech_vocabulary,
        speaker_dim=family.speaker_dim,
        tokenizer=tokenizer,
        speaker=speaker,
        **options,
    )
    names = ("token_rate", "codes", "speaker_dim", "fit_on", "max_seconds", "seed")
    settings = {
        "corpus": dict(corpus),
        **{name: getattr(wanted, name) for name in names},
        "speech_tokenizer": tokenizer.key,
        "speaker_encoder": speaker.key,
    }
    unknown = build(family.tokenizer, "tokenizer").unknown
    return prepare(build(corpus, "corpus"), out, wanted, settings, unknown)


def audio_fields(family: FamilyConfig, names: Iterable[str]) -> list[Field]:
    """Returns fields that the collators of a family read of audio, by name: mel, f0, wave.

    Raises:
        UserError: a name is unknown.
    """
    rate, mel = family.sample_rate, family.mel
    fields: dict[str, Field] = {
        "mel": Mel(sample_rate=rate, **asdict(mel)),
        "f0": F0(rate, mel.hop, family.pitch),
        "wave": Wave(rate),
    }
    if unknown := [name for name in names if name not in fields]:
        raise UserError(f"cache={unknown[0]} is not a field: choose of {', '.join(fields)}")
    return [fields[name] for name in names]


def fill_cache(out: Path, fields: Sequence[Field], processes: int) -> None:
    """Computes fields of a prepared folder now, instead of at the start of a training."""
    for split in SPLITS:
        if (out / f"{split}.list").stat().st_size:
            ensure(read_list(str(out / f"{split}.list")), fields, processes)


def check_family(folder: Path, family: FamilyConfig) -> None:
    """Checks that a folder was prepared for a family with this token rate.

    Raises:
        UserError: it was not, or is not a prepared folder.
    """
    meta = prepared(folder)
    if meta is None:
        raise UserError(
            f"{folder} is not a prepared data set (it has no {META}): python -m cosyexp.prepare "
            f"out={folder}"
        )
    rate = meta["settings"]["token_rate"]
    if rate != family.token_rate:
        raise UserError(
            f"{folder} holds {rate} speech tokens per second, family={family.name} needs "
            f"{family.token_rate}: prepare another folder with family={family.name}"
        )
