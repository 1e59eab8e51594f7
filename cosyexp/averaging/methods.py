"""How much of each checkpoint is in an average."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cosyexp.averaging.candidates import Candidate
from cosyexp.averaging.mean import combine
from cosyexp.errors import UserError

log = logging.getLogger(__name__)
Evaluate = Callable[[Path], Mapping[str, float]]  # the validation losses of a file of weights


@dataclass(frozen=True)
class WeightedSum:
    """sum(factor * weights) / divisor. sums: of the running sums instead of the weights."""

    sources: Sequence[Candidate]
    factors: Sequence[float]
    divisor: float
    sums: bool = False

    def rows(self) -> list[tuple[Candidate, float]]:
        """The sources, oldest first, with their weights in the average."""
        shares = [factor / self.divisor for factor in self.factors]
        return sorted(zip(self.sources, shares, strict=True), key=lambda row: row[0].age)

    def write(self, out: Path, pickled: bool = False) -> None:
        files = [source.sums if self.sums else source.path for source in self.sources]
        newest = max(self.sources, key=lambda source: source.age)
        combine(
            list(zip(files, self.factors, strict=True)), self.divisor, newest.path, out, pickled
        )


def mix(
    sources: Sequence[Candidate], method: str, metric: str, temperature: float, evaluate: Evaluate
) -> WeightedSum:
    if method == "weighted":
        return weighted(sources, metric, temperature)
    if method == "greedy":
        return greedy(sources, metric, evaluate)
    return running(sources) if method == "running" else uniform(sources)


def uniform(sources: Sequence[Candidate]) -> WeightedSum:
    return WeightedSum(sources, [1.0] * len(sources), len(sources))


def weighted(sources: Sequence[Candidate], metric: str, temperature: float) -> WeightedSum:
    """Weights of softmax(-loss / temperature)."""
    if not temperature > 0:
        raise UserError(
            f"temperature={temperature:g} weighs nothing: give a number above 0, in units of the metric"
        )
    losses = scores(sources, metric)
    factors = [math.exp((min(losses) - loss) / temperature) for loss in losses]
    return WeightedSum(sources, factors, sum(factors))


def running(sources: Sequence[Candidate]) -> WeightedSum:
    """The mean of the weights after each step behind the oldest of the checkpoints, up to the newest."""
    newest, oldest = (choose(sources, key=lambda source: source.age) for choose in (max, min))
    if newest.step == oldest.step:
        raise UserError(
            f"method=running takes the steps between two checkpoints, and there is only that of step {newest.step}: give more"
        )
    log.info(
        "the mean of the weights after each of the steps %d to %d", oldest.step + 1, newest.step
    )
    return WeightedSum([newest, oldest], [1.0, -1.0], newest.step - oldest.step, sums=True)


def greedy(sources: Sequence[Candidate], metric: str, evaluate: Evaluate) -> WeightedSum:
    """From the best on, each checkpoint that lowers the validation loss of the mean (Wortsman et al. 2022, greedy soup)."""
    ordered = [
        source
        for _, source in sorted(
            zip(scores(sources, metric), sources, strict=True), key=lambda pair: pair[0]
        )
    ]
    soup, lowest = ordered[:1], evaluate(ordered[0].path)[metric]
    log.info("step %d: validation %s %.4f", soup[0].step, metric, lowest)
    for source in ordered[1:]:
        with TemporaryDirectory() as folder:
            trial = Path(folder) / "trial.safetensors"
            uniform([*soup, source]).write(trial)
            found = evaluate(trial)[metric]
        kept = found < lowest
        log.info(
            "with step %d: validation %s %.4f, which is %s",
            source.step,
            metric,
            found,
            "lower" if kept else "not lower: left out",
        )
        if kept:
            soup, lowest = [*soup, source], found
    return uniform(soup)


def scores(sources: Sequence[Candidate], metric: str) -> list[float]:
    """What each was validated at; UserError where one was not."""
    for source in sources:
        if not math.isfinite(source.losses.get(metric, math.nan)):
            raise UserError(
                f"{source.path} has no finite validation {metric} to go by: give select=best, or method=uniform"
            )
    return [source.losses[metric] for source in sources]
