"""Evaluates models on a list of utterances."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cosyexp.config import EvaluateConfig
from cosyexp.data.shards import COLUMNS, open_shard, read_list, read_rows
from cosyexp.errors import MissingPackageError, UserError
from cosyexp.evaluation.evaluator import Evaluator, Sample, Truth
from cosyexp.evaluation.judges.base import Judge
from cosyexp.evaluation.models import load_models
from cosyexp.evaluation.scores import Score, Summary, summarize
from cosyexp.registry import build

log = logging.getLogger(__name__)
# what ranks utterances if no judge does, and which values are better
SIGNALS = {"mel_l1": "min", "perplexity": "min"}


class Row(NamedTuple):
    """What was measured of an utterance and a system.

    Attributes:
        utt: id of the utterance.
        system: name of the system.
        text: what should be said.
        scores: by metric.
        notes: texts of the judges, by name.
        speed: seconds per second of speech, with the speech as the weight; None if not measured.
    """

    utt: str
    system: str
    text: str
    scores: Mapping[str, Score]
    notes: Mapping[str, str]
    speed: Score | None


class Ranking(NamedTuple):
    """What tells which utterances are the worst.

    Attributes:
        system: name of the system.
        metric: name of the metric.
        mode: "min" or "max", which values are better.
    """

    system: str
    metric: str
    mode: str

    def cost(self, samples: Mapping[str, Sample]) -> float:
        """Returns a number of which the highest is worst."""
        score = samples[self.system].scores.get(self.metric)
        if score is None:
            return -math.inf
        return score.value if self.mode == "min" else -score.value


@dataclass
class Evaluation:
    """The result of an evaluation.

    Attributes:
        about: where each model is from.
        valid: the data lists.
        seed: of all random draws.
        sample_rate: of the speech, in Hz.
        left_out: why a judge is left out, by its name.
        rows: of all utterances and systems.
        shown: the worst utterances, with what each system makes of them, the worst first.
        ranking: what tells which those are; None if nothing does.
    """

    about: Mapping[str, Mapping[str, str]]
    valid: Sequence[str]
    seed: int
    sample_rate: int
    left_out: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    shown: list[tuple[Truth, dict[str, Sample]]] = field(default_factory=list)
    ranking: Ranking | None = None

    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Returns the mean of each metric, by system and metric."""
        scores: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            for metric, score in row.scores.items():
                scores[row.system][metric].append(score)
        return {
            system: {
                metric: summarize(found, metric, self.seed, system)
                for metric, found in by_metric.items()
            }
            for system, by_metric in scores.items()
        }

    def real_time_factors(self) -> dict[str, Summary]:
        """Returns the seconds that each system took per second of speech."""
        speeds: dict[str, list[Score]] = defaultdict(list)
        for row in self.rows:
            if row.speed is not None:
                speeds[row.system].append(row.speed)
        return {
            system: summarize(found, "rtf", self.seed, system) for system, found in speeds.items()
        }


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Loads the models and the judges, and measures all utterances.

    Raises:
        UserError: a model, a judge or the data cannot be used.
    """
    loaded = load_models(config)
    lists = config.valid or loaded.valid
    if not lists:
        raise UserError("there are no validation data: give valid=<a data list or parquet file>")
    valid = [lists] if isinstance(lists, str) else list(lists)
    judges, left_out = build_judges(config.judge)
    evaluator = Evaluator(loaded.models, judges, config.seed)
    found = Evaluation(loaded.about, valid, config.seed, evaluator.rate, left_out)
    rows, total = select_rows(valid, config.limit)
    bar = tqdm(rows, total=total, desc="evaluate", unit="utterance", disable=None)
    for truth in evaluator.truths(bar):
        samples = evaluator(truth)
        if not found.rows:
            found.ranking = ranking(samples, judges)
        found.rows += [
            Row(truth.utt, system, truth.text, x.scores, x.notes, evaluator.speed(truth, x))
            for system, x in samples.items()
        ]
        found.shown.append((truth, samples))
        if rank := found.ranking:
            found.shown.sort(key=lambda shown: -rank.cost(shown[1]))
        del found.shown[config.shown :]
    if not found.rows:
        raise UserError(f"{', '.join(valid)} has no usable utterance: prepare the data again")
    return found


def build_judges(nodes: Mapping[str, Any]) -> tuple[list[Judge], dict[str, str]]:
    """Builds judges from their config nodes, by name.

    Returns:
        The judges, and why others are left out, by name: their packages are not installed.
    """
    judges, left_out = list[Judge](), dict[str, str]()
    for name, node in nodes.items():
        judge: Judge = build(node, "judge")
        try:
            judge.load()
            judges.append(judge)
        except MissingPackageError as error:
            log.warning("the judge %s is left out: %s", name, error)
            left_out[name] = str(error)
    return judges, left_out


def select_rows(lists: Sequence[str], limit: int | None) -> tuple[Iterator[Mapping[str, Any]], int]:
    """Returns rows of data lists, spread over all of them, and their number.

    Args:
        lists: data lists or parquet files.
        limit: maximum number of rows; None: all.
    """
    shards = [shard for path in lists for shard in read_list(path)]
    total = sum(open_shard(shard).metadata.num_rows for shard in shards)
    count = min(total, limit or total)
    wanted = set(np.linspace(0, total - 1, count, dtype=int).tolist())
    rows = chain.from_iterable(read_rows(shard, COLUMNS.names) for shard in shards)
    return (row for number, row in enumerate(rows) if number in wanted), count


def ranking(samples: Mapping[str, Sample], judges: Sequence[Judge]) -> Ranking | None:
    """Returns what ranks utterances: the first judge, or else a signal, of the last system."""
    metrics = [next(iter(judge.metrics.items())) for judge in judges]
    for system, sample in reversed(list(samples.items())):
        for metric, mode in [*metrics, *SIGNALS.items()]:
            if metric in sample.scores:
                return Ranking(system, metric, mode)
    return None
