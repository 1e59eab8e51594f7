"""Writes a data set of preference pairs, from a data set and a trained llm.

<out>/train/00000.parquet ...  train.list     the shards with `reject_speech_token`
      valid/00000.parquet ...  valid.list
      speakers.safetensors ...                copied from the data, or else from the run, with
                                              the front ends next to it
      begun.yaml                              the settings, until all shards are written
      meta.yaml                               settings and statistics; written last
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

from tqdm import tqdm

from cosyexp.config import PreferConfig
from cosyexp.data.fingerprint import fingerprint
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.prepared import META, check_family, prepared, settings_of
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
from cosyexp.device import inference_device
from cosyexp.errors import UserError
from cosyexp.preferences.answers import AnswerGenerator, Prompt
from cosyexp.preferences.scores import Score, edit_distance, select_pair
from cosyexp.registry import build, check
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory, flat, voice_files
from cosyexp.run.documents import Fields, parse_json
from cosyexp.run.files import below, copy_file, refuse_links, remove_file, write_yaml
from cosyexp.run.weights import find_weights

log = logging.getLogger(__name__)
BEGUN = "begun.yaml"
WRITTEN = ("*.yaml*", "*.list*", "*.safetensors*", "train", "valid", "train/*", "valid/*")
SPLITS = ("train", "valid")
SETTINGS = ("candidates", "score", "limit", "seed")  # config keys that the pairs depend on


class Job(NamedTuple):
    """A shard to write, from the first `rows` rows of a source shard."""

    source: Path
    target: Path
    rows: int


@dataclass
class Tally:
    """Counts of utterances, of one shard or of all.

    Attributes:
        pairs: number of pairs.
        distance: sum over the pairs of the edit distance between the two answers.
        skipped: number of utterances that make no pair, by reason.
    """

    pairs: int = 0
    distance: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Tally") -> "Tally":
        skipped = dict(Counter(self.skipped) + Counter(other.skipped))
        return Tally(self.pairs + other.pairs, self.distance + other.distance, skipped)


def write_pairs(config: PreferConfig) -> dict[str, Any]:
    """Writes the pairs and returns the content of `meta.yaml`.

    Shards that exist already are kept, so that a repeated command continues where it stopped.

    Raises:
        UserError: the run is not one of an llm, the settings contradict each other, or the folder
            holds something else.
    """
    run, data, out = RunDirectory(config.run_dir), config.data, Path(config.out)
    if config.score is not None and config.candidates < 2:
        raise UserError(
            "score= ranks candidates, and there is one: give candidates=2, or score=none"
        )
    if config.score is not None:
        check(config.score, "score")
    trained = run.config()
    if trained.model.name != "llm":
        raise UserError(f"{run} is a run of {trained.model.name}: give one of an llm as run_dir=")
    weights, family = find_weights(run, config.weights), trained.family
    if data.corpus:
        assert data.dir is not None
        prepare_corpus(data.corpus, family, Path(data.dir))
    if data.dir:
        check_family(Path(data.dir), family)
    lists = {"train": data.train, "valid": data.valid or []}
    jobs = {split: list(plan(lists[split], out / split, config.limit)) for split in SPLITS}
    work = [job for split in SPLITS for job in jobs[split]]
    settings = {
        "token_rate": family.token_rate,
        **{key: getattr(config, key) for key in SETTINGS},
        "score": _without_device(config.score),
        "sampler": family.sampler,
        "weights": file_hash(weights),
        "data": digest(work),
    }
    refuse_other(out, settings)
    if (done := prepared(out)) is not None:
        return done
    score: Score | None = None if config.score is None else build(config.score, "score")
    generator = AnswerGenerator(
        trained,
        weights,
        device=inference_device(config.device),
        times=config.candidates,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    write_yaml(below(out, BEGUN), {"settings": settings})
    total, rows = Tally(), sum(job.rows for job in work)
    count = rows * config.candidates
    with tqdm(total=count, desc="prefer", unit="candidate", disable=None) as bar:
        for job in work:
            if job.target.exists():
                bar.update(job.rows * config.candidates)
            else:
                write_job(job, generator, score, bar)
            total += read_tally(job.target)
    for split in SPLITS:
        write_list(below(out, f"{split}.list"), [job.target for job in jobs[split]])
    keep_speakers(out, Path(data.speakers) if data.speakers else None, run.speakers)
    meta = {
        "settings": settings,
        "run": str(run),
        "utterances": rows,
        **asdict(total),
        "distance": total.distance / total.pairs if total.pairs else None,
    }
    write_yaml(below(out, META), meta)
    remove_file(out / BEGUN)
    return meta


def plan(lists: str | Sequence[str], folder: Path, limit: int | None) -> Iterator[Job]:
    """Yields the shards of a split.

    Args:
        lists: data lists of the split.
        folder: to write to.
        limit: maximum number of rows in all shards; None: all.
    """
    paths = [lists] if isinstance(lists, str) else lists
    shards = [shard for path in paths for shard in read_list(path)]
    for i, shard in enumerate(shards):
        rows = open_shard(shard).metadata.num_rows
        if limit is not None:
            rows = min(rows, limit)
            limit -= rows
        if rows:
            yield Job(shard, folder / f"{i:05d}.parquet", rows)


def digest(work: Sequence[Job]) -> str:
    """Returns a hash of the content of all source shards, which does not depend on their names."""
    content = [(fingerprint(job.source), job.target.parent.name) for job in work]
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


def refuse_other(out: Path, settings: Mapping[str, Any]) -> None:
    """Checks that a folder is empty, or was begun with the same settings.

    Args:
        out: the folder.
        settings: that the pairs depend on.

    Raises:
        UserError: it holds something else.
    """
    refuse_links(out, *WRITTEN)
    begun = prepared(out)
    if begun is None:
        try:
            begun = settings_of(out / BEGUN)
        except FileNotFoundError:
            if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
                raise UserError(
                    f"{out} holds something else than pairs: give another out="
                ) from None
            return
    before, now = dict(flat(begun["settings"])), dict(flat(settings))
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            named = key.split(".")[0] in SETTINGS
            change = f"{key}={before.get(key)}, not {now.get(key)}" if named else f"other {key}"
            raise UserError(
                f"{out} was begun with {change}: repeat the old command to continue it, or give "
                f"another out="
            )


def write_job(job: Job, generator: AnswerGenerator, score: Score | None, bar: "tqdm[Any]") -> None:
    """Writes one shard of pairs.

    A row that makes no pair keeps its speech tokens, and has no rejected ones.

    Args:
        job: the shard.
        generator: generates the candidates.
        score: rates them; None: see `select_pair`.
        bar: progress bar, which counts candidates.
    """
    columns = [*COLUMNS.names, *OPTIONAL.names]
    read = islice(read_rows(job.source, columns), job.rows)
    rows = [{**row, "reject_speech_token": None} for row in read]
    prompts: dict[int, Prompt] = {}
    tally, skipped, faults = Tally(), Counter[str](), []
    for i, row in enumerate(rows):
        try:
            prompts[i] = generator.prompt(row)
        except UserError:  # not a fault of the row
            raise
        except ValueError as error:
            faults.append(f"{row['utt']}: {error}")
    skipped["unusable"] = len(faults)
    bar.update(len(faults) * generator.times)
    answers: dict[int, list[list[int]]] = {i: [] for i in prompts}
    numbers = list(prompts)
    for index, tokens in generator(list(prompts.values())):
        answers[numbers[index]].append(tokens)
        bar.update()
    for i, row in enumerate(rows):
        if i not in answers:
            continue
        try:
            max_tokens = generator.limits(prompts[i])[1]
            chosen, rejected = select_pair(row, answers[i], score, max_tokens)
        except ValueError as error:
            skipped[str(error)] += 1
            continue
        row.update(speech_token=chosen, reject_speech_token=rejected)
        tally.pairs += 1
        tally.distance += edit_distance(chosen, rejected)
    if faults:
        message = "%s: %d of %d utterances cannot be used: %s"
        log.warning(message, job.source, len(faults), len(rows), "; ".join(faults))
    tally.skipped = dict(+skipped)
    write_shard(job.target, rows, json.dumps(asdict(tally)))


def read_tally(shard: Path) -> Tally:
    """Returns the counts that `write_job` kept in a shard.

    Raises:
        UserError: the shard is not one of pairs, or is damaged.
    """
    fields = Fields(parse_json(read_note(shard), shard), shard)
    return Tally(fields.whole("pairs"), fields.number("distance"), fields.counts("skipped"))


def keep_speakers(out: Path, *sources: Path | None) -> None:
    """Copies the first of the files of speakers that exists, and the front ends next to it."""
    source = next((source for source in sources if source and source.exists()), None)
    if source:
        for name, path in voice_files(source).items():
            copy_file(path, below(out, name))


def _without_device(score: Any) -> Any:
    """Returns the config node of a score without its device, which another command may change."""
    return {key: value for key, value in score.items() if key != "device"} if score else score
