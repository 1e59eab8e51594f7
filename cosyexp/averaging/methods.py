"""Methods that combine checkpoints into an average.

To add a method, write a class as those here, and a YAML in `conf/method/`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from cosyexp.arguments import Positive
from cosyexp.averaging.candidates import Candidate
from cosyexp.averaging.mean import combine
from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.run.checkpoint import Criterion

log = logging.getLogger(__name__)
Evaluate = Callable[[Path], Mapping[str, float]]  # validation losses of a file of weights


@dataclass(frozen=True)
class WeightedSum:
    """The average sum(factor * weights) / divisor over checkpoints.

    Attributes:
        sources: the checkpoints.
        factors: a factor for each.
        divisor: what the sum is divided by.
        running_sums: add the files of running sums, instead of the weights.
    """

    sources: Sequence[Candidate]
    factors: Sequence[float]
    divisor: float
    running_sums: bool = False

    def rows(self) -> list[tuple[Candidate, float]]:
        """Returns the checkpoints, oldest first, with their share in the average."""
        shares = [factor / self.divisor for factor in self.factors]
        return sorted(zip(self.sources, shares, strict=True), key=lambda row: row[0].age)

    @property
    def newest(self) -> Candidate:
        """The newest checkpoint, from which the average takes all that is no number."""
        return max(self.sources, key=lambda source: source.age)

    def write(self, out: Path, pickled: bool = False) -> None:
        """Writes the average to a file, as torch.save does if `pickled`, else as safetensors."""
        paths = [source.sums if self.running_sums else source.path for source in self.sources]
        parts = list(zip(paths, self.factors, strict=True))
        combine(parts, self.divisor, self.newest.path, out, pickled)


class Method(Protocol):
    """Protocol of methods, which combine the selected checkpoints.

    Attributes:
        suffix: of the average's folder name, such as "greedy"; empty for the plain mean.
        uses_metric: whether the result depends on the metric, apart from the selection.
        running_sums: whether it needs the running sums that `trainer.running_sum=true` keeps.
    """

    suffix: str
    uses_metric: bool
    running_sums: bool

    def __call__(
        self, sources: Sequence[Candidate], criterion: Criterion, evaluate: Evaluate
    ) -> WeightedSum:
        """Returns the weighted sum that is the average.

        Args:
            sources: the selected checkpoints.
            criterion: the validation metric of the command.
            evaluate: validates a file of weights, as training does.

        Raises:
            UserError: the checkpoints do not allow it.
        """
        ...


@register("method")
class Uniform:
    """The mean of the checkpoints."""

    suffix, uses_metric, running_sums = "", False, False

    def __call__(
        self, sources: Sequence[Candidate], criterion: Criterion, evaluate: Evaluate
    ) -> WeightedSum:
        """Gives every checkpoint the same weight."""
        return WeightedSum(sources, [1.0] * len(sources), len(sources))


@register("method")
class Weighted:
    """Weights of softmax(-cost / temperature), so that better checkpoints count more.

    Args:
        temperature: in units of the metric; large values approach the plain mean.
    """

    uses_metric, running_sums = True, False

    def __init__(self, *, temperature: Positive = 0.1) -> None:
        self.temperature, self.suffix = temperature, f"weighted{temperature:g}"

    def __call__(
        self, sources: Sequence[Candidate], criterion: Criterion, evaluate: Evaluate
    ) -> WeightedSum:
        """Weights each checkpoint by its validation."""
        costs = _costs(sources, criterion)
        factors = [math.exp((min(costs) - cost) / self.temperature) for cost in costs]
        return WeightedSum(sources, factors, sum(factors))


@register("method")
class Running:
    """The mean of the weights after every step between the oldest and the newest checkpoint.

    It needs two files only: the difference of two running sums (icefall's averaged model).
    """

    suffix, uses_metric, running_sums = "running", False, True

    def __call__(
        self, sources: Sequence[Candidate], criterion: Criterion, evaluate: Evaluate
    ) -> WeightedSum:
        """Subtracts the oldest running sum from the newest.

        Raises:
            UserError: there are not two checkpoints of different steps.
        """
        newest = max(sources, key=lambda source: source.age)
        oldest = min(sources, key=lambda source: source.age)
        if newest.step == oldest.step:
            raise UserError(
                f"method=running averages the steps between two checkpoints, and there is only the "
                f"one of step {newest.step}: select more"
            )
        log.info("averaging the weights after steps %d to %d", oldest.step + 1, newest.step)
        steps = newest.step - oldest.step
        return WeightedSum([newest, oldest], [1.0, -1.0], steps, running_sums=True)


@register("method")
class Greedy:
    """A greedy soup of checkpoints (Wortsman et al. 2022, "Model soups", recipe 1).

    Starts from the best checkpoint, and adds each of the others, from the better to the worse, if
    it improves the validation of the mean.
    """

    suffix, uses_metric, running_sums = "greedy", True, False

    def __call__(
        self, sources: Sequence[Candidate], criterion: Criterion, evaluate: Evaluate
    ) -> WeightedSum:
        """Validates one mean per checkpoint."""
        mean, metric = Uniform(), criterion.metric
        costs = _costs(sources, criterion)
        ranked = sorted(zip(costs, sources, strict=True), key=lambda pair: pair[0])
        order = [source for _, source in ranked]
        soup, losses = order[:1], evaluate(order[0].path)
        lowest = criterion.cost(losses)
        log.info("step %d: validation %s %.4f", soup[0].step, metric, losses[metric])
        for source in order[1:]:
            with TemporaryDirectory() as folder:
                trial = Path(folder) / "trial.safetensors"
                mean([*soup, source], criterion, evaluate).write(trial)
                losses = evaluate(trial)
            kept = criterion.cost(losses) < lowest
            outcome = "better: kept" if kept else "not better: left out"
            message = "with step %d: validation %s %.4f, %s"
            log.info(message, source.step, metric, losses[metric], outcome)
            if kept:
                soup, lowest = [*soup, source], criterion.cost(losses)
        return mean(soup, criterion, evaluate)


def _costs(sources: Sequence[Candidate], criterion: Criterion) -> list[float]:
    """Returns the cost of each checkpoint.

    Raises:
        UserError: one was not validated by the metric, its value is not finite, or they were
            validated on different data.
    """
    if len({source.validation for source in sources}) > 1:
        raise UserError(
            f"{sources[0].path} and others were validated on different data, so their "
            f"{criterion.metric} cannot be compared: select others by select=best, or use "
            f"method=uniform"
        )
    for source in sources:
        if not math.isfinite(criterion.cost(source.losses)):
            raise UserError(
                f"{source.path} has no finite validation {criterion.metric}: select others by "
                f"select=best, or use method=uniform"
            )
    return [criterion.cost(source.losses) for source in sources]
