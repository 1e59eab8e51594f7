"""From a data set and a trained llm to a data set of preference pairs.

<out>/train/00000.parquet ...  train.list      valid/..., valid.list      the shards of the data with `reject_speech_token`
      speakers.safetensors                                                those of the data, else of the run
      begun.yaml                                                          the settings, until all shards are there
      meta.yaml                                                           written last: a folder without it is not prepared
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from cosyexp.data.cache import fingerprint
from cosyexp.data.preparation import META, check_family, prepare_corpus, prepared
from cosyexp.data.shards import (
    COLUMNS,
    OPTIONAL,
    open_shard,
    read_list,
    read_note,
    read_rows,
    write_list,
    write_shard,
)
from cosyexp.errors import UserError
from cosyexp.preferences.answers import AnswerGenerator, Prompt
from cosyexp.preferences.scores import Score, edit, edit_distance, pair
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import replace_file, write_text
from cosyexp.run.weights import find_weights

log = logging.getLogger(__name__)
BEGUN = "begun.yaml"
SPLITS = ("train", "valid")
SAID = (
    "candidates",
    "score",
    "limit",
    "seed",
    "flow",
    "hifigan",
    "asr",
    "language",
)  # the options on which the pairs depend


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """See `cosyexp.config.Prefer`."""

    candidates: int = 1
    score: str = "none"
    weights: str = "best"
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    flow: str | None = None
    hifigan: str | None = None
    asr: str | None = None
    language: str | None = None

    def check(self) -> None:
        for key in ("candidates", "batch_size", "limit"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{key}={value} makes no sense: give a whole number of at least 1")
        if self.score != "none" and self.candidates < 2:
            raise UserError(
                f"score={self.score} compares candidates, and there is one: give candidates=2 or more, or score=none"
            )
        if self.score == "wer" and not (self.flow and self.hifigan):
            raise UserError(
                "score=wer listens to the candidates: give flow=<run> and hifigan=<run>, which make them audible"
            )


class Job(NamedTuple):
    """The first `rows` rows of a shard, to be written as another."""

    source: Path
    target: Path
    rows: int


@dataclass
class Tally:
    """What became of utterances: pairs, the sum of the distances within them, and how many were skipped for what reason."""

    pairs: int = 0
    distance: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Tally") -> "Tally":
        skipped = dict(Counter(self.skipped) + Counter(other.skipped))
        return Tally(self.pairs + other.pairs, self.distance + other.distance, skipped)


def write_pairs(
    run: RunDirectory, data: Mapping[str, Any], out: Path, options: PairOptions
) -> dict[str, Any]:
    """Writes the pairs and returns what `meta.yaml` holds; shards that are there already are left alone.

    data: the node of the config.
    """
    options.check()
    config = run.config()
    if (model := config["model"]["name"]) != "llm":
        raise UserError(
            f"{run} is a run of {model}, which has no preferences: give one of llm as run_dir="
        )
    weights, family = find_weights(run, options.weights), config["family"]
    if "corpus" in data:
        prepare_corpus(data["corpus"], family, Path(data["dir"]))
    if "dir" in data:
        check_family(Path(data["dir"]), family)
    jobs = {split: list(plan(data[split], out / split, options.limit)) for split in SPLITS}
    work = [job for split in SPLITS for job in jobs[split]]
    settings = {
        "token_rate": family["token_rate"],
        **{key: getattr(options, key) for key in SAID},
        "sampler": dict(family["sampler"]),
        "weights": file_hash(weights),
        "data": digest(work),
    }
    refuse_other(out, settings)
    if (done := prepared(out)) is not None:
        return done
    score = score_of(run, options)
    candidates = AnswerGenerator(
        config, weights, times=options.candidates, batch_size=options.batch_size, seed=options.seed
    )
    write_text(out / BEGUN, yaml.safe_dump({"settings": settings}))
    total = Tally()
    with tqdm(
        total=sum(job.rows for job in work) * options.candidates,
        desc="prefer",
        unit="candidate",
        disable=None,
    ) as bar:
        for job in work:
            if job.target.exists():
                bar.update(job.rows * options.candidates)
            else:
                write_job(job, candidates, score, bar)
            total += Tally(**json.loads(read_note(job.target)))
    for split in SPLITS:
        write_list(out / f"{split}.list", [job.target for job in jobs[split]])
    keep_speakers(out, Path(data["speakers"]) if data["speakers"] else None, run.speakers)
    meta = {
        "settings": settings,
        "run": str(run),
        "utterances": sum(job.rows for job in work),
        **asdict(total),
        "distance": total.distance / total.pairs if total.pairs else None,
    }
    write_text(out / META, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))
    (out / BEGUN).unlink()
    return meta


def score_of(run: RunDirectory, options: PairOptions) -> Score | None:
    if options.score == "none":
        return None
    if options.score == "edit":
        return edit
    from cosyexp.preferences.asr_score import ErrorRate  # and all that speaks and listens

    assert options.flow and options.hifigan
    return ErrorRate(
        str(run),
        options.flow,
        options.hifigan,
        asr=options.asr,
        language=options.language,
        seed=options.seed,
    )


def plan(lists: str | Sequence[str], folder: Path, limit: int | None) -> Iterator[Job]:
    """The shards of a split, as far as the limit."""
    shards = [
        shard
        for path in ([lists] if isinstance(lists, str) else lists)
        for shard in read_list(path)
    ]
    for i, shard in enumerate(shards):
        rows = open_shard(shard).metadata.num_rows
        if limit is not None:
            rows = min(rows, limit)
            limit -= rows
        if rows:
            yield Job(shard, folder / f"{i:05d}.parquet", rows)


def digest(work: Sequence[Job]) -> str:
    """What is read, whatever it is called."""
    content = [(fingerprint(job.source), job.target.parent.name) for job in work]
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


def refuse_other(out: Path, settings: Mapping[str, Any]) -> None:
    """UserError where a folder holds something else than a part of what these settings make."""
    begun = prepared(out)
    if begun is None:
        try:
            begun = yaml.safe_load((out / BEGUN).read_text())
        except FileNotFoundError:
            if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
                raise UserError(
                    f"{out} holds something else than pairs: give another out="
                ) from None
            return
    for key, value in settings.items():
        if (before := begun["settings"].get(key)) != value:
            told = f"{key}={before}, not {value}" if key in SAID else f"other {key}"
            raise UserError(
                f"{out} was begun with {told}: repeat the old command to continue it, or give another out="
            )


def write_job(job: Job, candidates: AnswerGenerator, score: Score | None, bar: "tqdm[Any]") -> None:
    """Writes one shard of pairs. A row that makes none keeps its speech tokens, and has none to reject."""
    rows = [
        {**row, "reject_speech_token": None}
        for row in islice(read_rows(job.source, [*COLUMNS.names, *OPTIONAL.names]), job.rows)
    ]
    prompts: dict[int, Prompt] = {}
    tally, skipped, faults = Tally(), Counter[str](), []
    for i, row in enumerate(rows):
        try:
            prompts[i] = candidates.prompt(row)
        except UserError:  # no fault of the row
            raise
        except ValueError as error:
            faults.append(f"{row['utt']}: {error}")
    skipped["unusable"] = len(faults)
    bar.update(len(faults) * candidates.times)
    answers: dict[int, list[list[int]]] = {i: [] for i in prompts}
    places = list(prompts)
    for place, tokens in candidates(list(prompts.values())):
        answers[places[place]].append(tokens)
        bar.update()
    for i, row in enumerate(rows):
        if i in answers:
            try:
                chosen, rejected = pair(row, answers[i], score, candidates.limits(prompts[i])[1])
            except ValueError as error:
                skipped[str(error)] += 1
                continue
            row.update(speech_token=chosen, reject_speech_token=rejected)
            tally.pairs += 1
            tally.distance += edit_distance(chosen, rejected)
    if faults:
        log.warning(
            "%s: %d of %d utterances cannot be used: %s",
            job.source,
            len(faults),
            len(rows),
            "; ".join(faults),
        )
    tally.skipped = dict(+skipped)
    write_shard(job.target, rows, json.dumps(asdict(tally)))


def keep_speakers(out: Path, *sources: Path | None) -> None:
    """Copies the first of the files that is there."""
    source = next((source for source in sources if source and source.exists()), None)
    if source:
        content = source.read_bytes()
        with replace_file(out / "speakers.safetensors") as file:
            file.write(content)
