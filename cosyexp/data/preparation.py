"""Prepares a corpus: encodes its recordings, and writes parquet shards and statistics.

Front ends are fitted, or loaded; they encode the corpus part by part; the recordings that cannot be
used are counted; shards are written from the others. A preparation that was interrupted goes on
where it stopped. The files of the folder are described in `prepared.py`.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosyexp.config import FamilyConfig
from cosyexp.data.corpora.base import Corpus
from cosyexp.data.encoding import Encoder, check, legible, listen, row_of, write
from cosyexp.data.filtering import Filter
from cosyexp.data.frontends.base import FrontEnd, Recipe, Wanted
from cosyexp.data.frontends.kmeans import KMeans
from cosyexp.data.frontends.mel_speaker import MelStatistics
from cosyexp.data.parts import encode, jobs, survey
from cosyexp.data.population import MAX_UNKNOWN, Rules
from cosyexp.data.prepared import BEGUN, META, PARTS, SPLITS, WRITTEN, prepared, tidy
from cosyexp.data.report import Report
from cosyexp.data.segmentation import Segmented, Segmenter
from cosyexp.data.shards import write_list
from cosyexp.data.splits import Split
from cosyexp.data.treatment import Treatment
from cosyexp.data.workers import Workers
from cosyexp.errors import UserError
from cosyexp.registry import build
from cosyexp.run.documents import read_text
from cosyexp.run.files import below, refuse_links, replacement, to_yaml, write_text, write_yaml
from cosyexp.run.tensors import save_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Wanted):
    """Settings of a preparation, in addition to what the family requires of the front ends.

    Attributes:
        tokenizer: front end of the speech tokens.
        speaker: front end of the speaker embeddings.
        shard_size: utterances per parquet file.
        fit_on: maximum number of recordings that the front ends are fitted on.
        max_seconds: maximum length of a recording in seconds.
        processes: number of parallel processes.
        max_bad: share of the recordings that may be unusable.
        treatment: what is done to recordings before they are encoded.
        segment: cuts long recordings; None: none are cut.
        rules: which recordings are left out.
        dry_run: whether only the report is written.
    """

    tokenizer: Recipe = field(default_factory=KMeans)
    speaker: Recipe = field(default_factory=MelStatistics)
    shard_size: int = 200
    fit_on: int = 2000
    max_seconds: float = 30.0
    processes: int = 2
    max_bad: float = 0.05
    treatment: Treatment = field(default_factory=Treatment)
    segment: Segmenter | None = None
    rules: Rules = field(default_factory=Rules)
    dry_run: bool = False


def prepare(
    corpus: Corpus,
    out: Path,
    options: PrepareOptions,
    settings: Mapping[str, Any],
    choice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the data set, unless it is there already, and returns the content of `meta.yaml`.

    A dry run encodes the recordings and writes the report, and neither shards nor `meta.yaml`; the
    same command without it goes on from there, also with another choice.

    Args:
        corpus: the recordings.
        out: the folder.
        options: front ends, sizes and limits.
        settings: what the data set depends on; a folder of other settings is refused.
        choice: settings that say which recordings are used, once they are encoded.

    Raises:
        UserError: if the folder has other settings, the corpus is empty, too many recordings are
            unusable, or a process was killed.
    """
    if (done := prepared(out)) is not None:
        if done["settings"] != {**settings, **(choice or {})}:
            raise UserError(
                f"{out} holds a data set of other settings: give another out=, or remove "
                f"that folder"
            )
        tidy(out)
        return done
    refuse_links(out, *WRITTEN)
    if (total := len(corpus)) == 0:
        raise UserError("the corpus holds no recording: check its path")
    for line in getattr(corpus, "found", tuple)():
        log.info("%s", line)
    split: Split = getattr(corpus, "split", Split(held_out=0))
    shards: dict[str, list[Path]] = {name: [] for name in SPLITS}
    refuse_begun(out, settings)
    with Workers(options.processes) as workers, resumable():
        if options.segment is not None:
            corpus = Segmented(corpus, options.segment, out / PARTS, workers)
            total = len(corpus)
        encoder = front_ends(corpus, split, out, options, settings)
        log.info("preparing %d recordings in %s, once", total, out)
        parts = encode(encoder, corpus, total, out / PARTS, workers)
        found = survey(parts, split, options.rules, out)
        report, speakers = found.report, found.speakers
        refuse_too_many(report, options.max_bad, out)
        meta = {
            "settings": {**settings, **(choice or {})},
            **report.summary(options.rules.unknown),
            "speakers": list(speakers),
        }
        found.quality.write(out, parts, {**report.facts(), "leaks": found.leaks})
        if options.dry_run:
            return meta
        to_write = jobs(parts, found.held_out, speakers, out, options.shard_size)
        for path in workers.map(write, to_write):
            shards[path.parent.name].append(path)
    for name in SPLITS:
        write_list(below(out, f"{name}.list"), shards[name])
        if not shards[name]:
            log.warning("%s.list is empty: no utterance is left for it", name)
    with replacement(below(out, "speakers.safetensors")) as part:
        save_tensors(part, {name: torch.from_numpy(mean) for name, mean in speakers.items()})
    write_yaml(below(out, META), meta)
    tidy(out)
    return meta


@contextmanager
def resumable() -> Iterator[None]:
    """Says how to go on after what ends the block early.

    Raises:
        UserError: a process was killed.
    """
    try:
        yield
    except KeyboardInterrupt:
        log.warning("interrupted: the same command goes on where this one stopped")
        raise
    except BrokenProcessPool:
        raise UserError(
            "a process was killed (out of memory?): repeat the command, perhaps with fewer "
            "processes="
        ) from None


def front_ends(
    corpus: Corpus, split: Split, out: Path, options: PrepareOptions, settings: Mapping[str, Any]
) -> Encoder:
    """Fits the front ends on the first recordings, or loads those of an interrupted preparation.

    Args:
        corpus: the recordings; those that it or a list holds out are not used.
        split: knows what a list holds out.
        out: the folder, which keeps the front ends and the settings.
        options: names the front ends, and how many recordings they are fitted on.
        settings: of the preparation, see `prepare`.

    Raises:
        UserError: if a front end cannot be fitted on these recordings.
    """
    resumed = (out / BEGUN).exists()
    waves = Waves(corpus, split, out, options)
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
    write_text(below(out, BEGUN), to_yaml({"settings": dict(settings)}))
    for front_end, name in zip(ready, ("speech_tokenizer", "speaker_encoder"), strict=True):
        front_end.save(below(out, f"{name}.safetensors"))
    return Encoder(
        tokenizer=ready[0],
        speaker=ready[1],
        longest=options.max_seconds,
        treatment=options.treatment,
    )


def refuse_begun(out: Path, settings: Mapping[str, Any]) -> None:
    """Checks that no preparation with other settings was begun in a folder.

    Raises:
        UserError: if one was.
    """
    begun = out / BEGUN
    if begun.exists() and read_text(begun) != to_yaml({"settings": dict(settings)}):
        raise UserError(
            f"{out} holds the beginning of a data set of other settings: give another out=, or "
            f"remove that folder"
        )


class Waves:
    """Waveforms of the first usable recordings, read at each iteration.

    Raises:
        UserError: at the end of an iteration, if none of the recordings can be used;
            `dropped.tsv` then names them.
    """

    def __init__(self, corpus: Corpus, split: Split, out: Path, options: PrepareOptions) -> None:
        self.corpus, self.split, self.out, self.options = corpus, split, out, options

    def __iter__(self) -> Iterator[np.ndarray]:
        faults: list[dict[str, Any]] = []
        treatment, count = self.options.treatment, 0
        for recording in islice(
            (
                r
                for r in self.corpus.recordings()
                if not self.split.planned(r.utt, r.speaker, r.held_out)
            ),
            self.options.fit_on,
        ):
            try:
                check(recording, transcribed=treatment.transcribe is not None)
                sound = treatment.sound(listen(recording, self.options.max_seconds))
            except ValueError as error:  # reported when it is encoded, or if all have one
                if not count:
                    faults.append({**row_of(recording), "fault": legible(str(error))})
                continue
            count += 1
            yield sound.speech_S
        if not count:
            with Report(self.out / "dropped.tsv") as report:
                for row in faults:
                    report.add(row)
            refuse_too_many(report, self.options.max_bad, self.out)


def refuse_too_many(report: Report, max_bad: float, out: Path) -> None:
    """Warns of the recordings that were left out, and checks that they are not too many.

    Args:
        report: the statistics.
        max_bad: share of the recordings that may be left out.
        out: the folder, for the message.

    Raises:
        UserError: if more were left out, or all.
    """
    if report.dropped:
        log.warning(
            "%d of %d recordings left out: %s",
            report.dropped,
            report.total,
            report.some(f"{out}/dropped.tsv"),
        )
    if report.dropped == report.total:
        raise UserError(
            f"none of the first {report.total} recordings can be used: {report.causes()}; "
            f"{out}/dropped.tsv names all"
        )
    if (faults := report.dropped - report.filtered) > max_bad * report.total:
        raise UserError(
            f"{faults} of {report.total} recordings cannot be used, more than "
            f"max_bad={max_bad} allows: {report.causes()}; {out}/dropped.tsv names all"
        )


def prepare_corpus(
    corpus: Mapping[str, Any],
    family: FamilyConfig,
    out: Path,
    speech_tokenizer: Recipe | None = None,
    speaker_encoder: Recipe | None = None,
    filter: str | None = None,
    max_unknown: float = MAX_UNKNOWN,
    **options: Any,
) -> dict[str, Any]:
    """Prepares a corpus for a family, see `prepare`.

    Args:
        corpus: config node of the corpus.
        family: gives the token rate, the vocabulary and the tokenizer.
        out: the folder.
        speech_tokenizer: front end of the speech tokens; None: k-means.
        speaker_encoder: front end of the speaker embeddings; None: statistics of the mel.
        filter: which recordings are kept, see `Filter`; None: all.
        max_unknown: share of a text that the family's tokenizer may not know.
        options: see `PrepareOptions`.

    Returns:
        The content of `meta.yaml`.
    """
    tokenizer, speaker = speech_tokenizer or KMeans(), speaker_encoder or MelStatistics()
    wanted = PrepareOptions(
        token_rate=family.token_rate,
        codes=family.speech_vocabulary,
        speaker_dim=family.speaker_dim,
        tokenizer=tokenizer,
        speaker=speaker,
        rules=Rules(
            filter=Filter(filter or ""),
            unknown=build(family.tokenizer, "tokenizer").unknown,
            max_unknown=max_unknown,
        ),
        **options,
    )
    if "wer" in wanted.rules.filter.names and wanted.treatment.verify is None:
        raise UserError("filter= reads wer, which is only measured with verify=asr: add it")
    choice = {
        **({"filter": filter} if filter else {}),
        **({"max_unknown": max_unknown} if max_unknown != MAX_UNKNOWN else {}),
    }
    names = ("token_rate", "codes", "speaker_dim", "fit_on", "max_seconds", "seed")
    settings = {
        "corpus": dict(corpus),
        **{name: getattr(wanted, name) for name in names},
        "speech_tokenizer": tokenizer.key,
        "speaker_encoder": speaker.key,
        **wanted.treatment.settings,
        **({} if wanted.segment is None else {"segment": repr(wanted.segment)}),
    }
    return prepare(build(corpus, "corpus"), out, wanted, settings, choice)
