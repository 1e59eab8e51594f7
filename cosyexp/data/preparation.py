"""From recordings to a data set: parquet shards, their lists, and the front ends that made them.

<out>/train/00000.parquet ...  train.list      valid/..., valid.list
      speech_tokenizer.safetensors  speaker_encoder.safetensors     fitted on the training split, kept for new speech
      speakers.safetensors                                          the mean embedding of each speaker
      meta.yaml                                                     written last: a folder without it is not prepared
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from cosyexp.data import features
from cosyexp.data.cache import one_thread
from cosyexp.data.corpora.base import Recording, Source
from cosyexp.data.frontends.kmeans import SAMPLE_RATE, KMeansTokenizer
from cosyexp.data.frontends.mel_speaker import MelSpeakerEncoder
from cosyexp.data.shards import write_list, write_shard
from cosyexp.errors import UserError
from cosyexp.run.files import write_text
from cosyexp.run.targets import build
from cosyexp.run.tensors import save_tensors

log = logging.getLogger(__name__)
META = "meta.yaml"
CODES = 512  # speech tokens, so that families of one token rate can share a data set
CHUNK = 32  # recordings that a process takes at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """token_rate: tokens a second. codes: how many different ones. speaker_dim: numbers of a speaker embedding.

    shard_size: utterances in a parquet file. fit_on: recordings at most that the front ends are fitted on. processes: at work
    side by side. max_bad: the share of recordings that may be unusable.
    """

    token_rate: int
    codes: int
    speaker_dim: int
    shard_size: int = 200
    fit_on: int = 2000
    processes: int = 2
    max_bad: float = 0.05
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What the front ends made of a recording; `fault` says why, where they could not."""

    utt: str
    speaker: str
    tokens: np.ndarray | None = None
    embedding: np.ndarray | None = None
    seconds: float = 0.0
    fault: str = ""


@dataclass(frozen=True)
class FrontEnds:
    tokenizer: KMeansTokenizer
    speaker: MelSpeakerEncoder

    @one_thread()
    def __call__(self, recording: Recording) -> Encoded:
        empty = Encoded(utt=recording.utt, speaker=recording.speaker)
        try:
            if not recording.text.strip():
                raise ValueError("it has no text")
            wave = features.read_wave(recording.audio, SAMPLE_RATE)
            tokens, embedding = np.array(self.tokenizer.encode(wave), np.int32), self.speaker.encode(wave)
        except ValueError as error:
            return replace(empty, fault=str(error))
        return replace(empty, tokens=tokens, embedding=embedding, seconds=len(wave) / SAMPLE_RATE)


def prepare(source: Source, out: Path, options: Options, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the data set and returns what `meta.yaml` holds; a folder prepared with the same `settings` is left alone."""
    if (done := prepared(out)) is not None:
        if done["settings"] != settings:
            raise UserError(f"{out} holds a data set of other settings: give another out=, or remove that folder")
        return done
    log.info("preparing %d recordings in %s, once", len(source), out)
    front_ends = fit(source, options)
    encoded = list(tqdm(encode(front_ends, source, options.processes), "prepare", len(source), unit="utt", disable=None))
    faults = {e.utt: e.fault for e in encoded if e.fault}
    if faults:
        log.warning("%d of %d recordings left out: %s", len(faults), len(encoded), "; ".join(map(": ".join, faults.items())))
    if len(faults) > options.max_bad * len(encoded):
        raise UserError(
            f"{len(faults)} of {len(encoded)} recordings cannot be used, more than max_bad={options.max_bad} allows; "
            f"the first is {': '.join(next(iter(faults.items())))}"
        )
    voices: dict[str, list[np.ndarray]] = {}
    for e in encoded:
        if e.embedding is not None and not e.fault:
            voices.setdefault(e.speaker, []).append(e.embedding)
    speakers = {speaker: np.stack(voices[speaker]).mean(0, dtype=np.float32) for speaker in sorted(voices)}
    write_shards(source, encoded, speakers, out, options.shard_size)
    front_ends.tokenizer.save(out / "speech_tokenizer.safetensors")
    front_ends.speaker.save(out / "speaker_encoder.safetensors")
    save_tensors(out / "speakers.safetensors", {name: torch.from_numpy(mean) for name, mean in speakers.items()})
    meta = {
        "settings": dict(settings),
        "hours": round(sum(e.seconds for e in encoded) / 3600, 3),
        "speakers": list(speakers),
        "utterances": len(encoded) - len(faults),
        "left_out": faults,
    }
    write_text(out / META, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))
    return meta


def prepared(out: Path) -> dict[str, Any] | None:
    """What `meta.yaml` says of a prepared folder; None where it is not (wholly) prepared."""
    try:
        meta = yaml.safe_load((out / META).read_text())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        meta = None
    if not isinstance(meta, dict) or "settings" not in meta:
        raise UserError(f"{out}/{META} is not what prepare wrote: remove {out}, and prepare it again")
    return meta


def fit(source: Source, options: Options) -> FrontEnds:
    """Fits tokenizer and speaker encoder on the first recordings of the training split."""
    waves = []
    for recording in islice((r for r in source.recordings() if not r.held_out), options.fit_on):
        with suppress(ValueError):  # what cannot be read is named when it is encoded
            waves.append(features.read_wave(recording.audio, SAMPLE_RATE))
    if not waves:
        raise UserError("none of the first recordings can be read as audio: look at the corpus's path")
    try:
        tokenizer = KMeansTokenizer.fit(waves, codes=options.codes, rate=options.token_rate, seed=options.seed)
    except ValueError as error:
        raise UserError(f"the speech tokens cannot be fitted: {error}; take fewer, or more speech") from None
    return FrontEnds(tokenizer, MelSpeakerEncoder.fit(waves, width=options.speaker_dim, seed=options.seed))


def encode(front_ends: FrontEnds, source: Source, processes: int) -> Iterator[Encoded]:
    """Every recording through the front ends, in order; an id that occurs twice is a fault."""
    seen: set[str] = set()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else nullcontext() as pool:
        work = pool.map(front_ends, source.recordings(), chunksize=CHUNK) if pool else map(front_ends, source.recordings())
        for encoded in work:
            yield replace(encoded, fault="its id occurs twice") if encoded.utt in seen else encoded
            seen.add(encoded.utt)


def write_shards(source: Source, encoded: Sequence[Encoded], speakers: Mapping[str, np.ndarray], out: Path, size: int) -> None:
    """The shards of both splits, and their lists."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    shards: dict[str, list[Path]] = {"train": [], "valid": []}

    def flush(split: str) -> None:
        if rows[split]:
            shards[split].append(out / split / f"{len(shards[split]):05d}.parquet")
            write_shard(shards[split][-1], rows[split])
            rows[split].clear()

    for recording, front in zip(source.recordings(), encoded, strict=True):
        if front.fault:
            continue
        split = "valid" if recording.held_out else "train"
        rows[split].append(
            {
                "utt": recording.utt,
                "audio_data": recording.audio,
                "wav": recording.path,
                "text": recording.text,
                "spk": recording.speaker,
                "utt_embedding": front.embedding,
                "spk_embedding": speakers[recording.speaker],
                "speech_token": front.tokens,
            }
        )
        if len(rows[split]) == size:
            flush(split)
    for split in rows:
        flush(split)
        write_list(out / f"{split}.list", shards[split])


def prepare_corpus(corpus: Mapping[str, Any], family: Mapping[str, Any], out: Path, codes: int = CODES, **options: Any) -> dict[str, Any]:
    """Prepares a corpus as a family reads it; `corpus` and `family` are nodes of the config."""
    codes = min(codes, family["speech_vocabulary"])
    rates = {"token_rate": family["token_rate"], "codes": codes, "speaker_dim": family["speaker_dim"]}
    settings = {"corpus": dict(corpus), **rates}
    return prepare(build(corpus), out, Options(**rates, **options), settings)


def check_family(folder: Path, family: Mapping[str, Any]) -> None:
    """UserError where a prepared folder is none, or was prepared for a family with another token rate."""
    meta = prepared(folder)
    if meta is None:
        raise UserError(f"{folder} is no prepared data set (it has no {META}): python -m cosyexp.prepare out={folder}")
    rate = meta["settings"]["token_rate"]
    if rate != family["token_rate"]:
        raise UserError(
            f"{folder} holds {rate} speech tokens a second, family={family['name']} wants {family['token_rate']}: "
            f"prepare another folder with family={family['name']}"
        )
