"""An averaging method: later checkpoints weigh more."""

from collections.abc import Sequence

from cosyexp.averaging.candidates import Candidate
from cosyexp.averaging.methods import Evaluate, WeightedSum
from cosyexp.run.checkpoint import Criterion


class Ramp:
    """Weights 1, 2, 3, ... from the oldest to the newest checkpoint."""

    suffix, uses_metric, running_sums = "ramp", False, False

    def __call__(
        self, sources: Sequence[Candidate], criterion: Criterion, evaluate: Evaluate
    ) -> WeightedSum:
        """Returns the weighted sum."""
        ordered = sorted(sources, key=lambda source: source.age)
        factors = [float(i + 1) for i in range(len(ordered))]
        return WeightedSum(ordered, factors, sum(factors))
