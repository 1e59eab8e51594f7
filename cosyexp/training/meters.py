"""Accumulates the losses and gradient norms of updates on the device, until they are logged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cosyexp.objectives.base import Loss
from cosyexp.training.engines.base import StepReport

# the terms of a loss on the host: name -> (sum, unit, factor)
Sums = Mapping[str, tuple[float, str, float]]


def to_host(loss: Loss) -> Sums:
    """Copies all sums of a loss to the host in one transfer."""
    if not loss:
        return {}
    values = torch.stack([term.sum.double() for term in loss.values()]).tolist()
    return {
        name: (value, term.unit, term.factor)
        for (name, term), value in zip(loss.items(), values, strict=True)
    }


def means(parts: Sequence[Sums], units: Mapping[str, float]) -> dict[str, float]:
    """Computes the mean of each term per unit, and `loss`, their sum weighted by the factors.

    Args:
        parts: the sums of several batches; they are added in this order, in fp64.
        units: number of units in all batches together, for each kind.
    """
    totals: dict[str, float] = {}
    terms = {name: (unit, factor) for part in parts for name, (_, unit, factor) in part.items()}
    for part in parts:
        for name, (value, _, _) in part.items():
            totals[name] = totals.get(name, 0.0) + value
    each = {name: total / units[terms[name][0]] for name, total in totals.items()}
    return {"loss": sum(terms[name][1] * mean for name, mean in each.items()), **each}


class Meter:
    """Accumulates the metrics of one trainable's updates since the last log.

    The losses are those of this rank; units, gradient norm and updates are the same on all ranks.
    """

    def __init__(self) -> None:
        self.loss = Loss()
        self.units: dict[str, float] = {}
        self.norm: torch.Tensor | float = 0.0
        self.updates = 0

    def add(self, losses: Sequence[Loss], units: Mapping[str, float], report: StepReport) -> None:
        """Adds one update.

        Args:
            losses: the detached losses of this rank's micro-batches.
            units: number of units in the whole step, over all micro-batches and ranks.
            report: what the engine returned for the update.
        """
        for loss in losses:
            for name, term in loss.items():
                self.loss[name] = (
                    term._replace(sum=self.loss[name].sum + term.sum) if name in self.loss else term
                )
        for unit, count in units.items():
            self.units[unit] = self.units.get(unit, 0.0) + count
        self.norm, self.updates = self.norm + report.grad_norm.double(), self.updates + 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers on the host."""
        return {
            "loss": dict(to_host(self.loss)),
            "units": self.units,
            "norm": float(self.norm),
            "updates": self.updates,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores a state that `state_dict` returned."""
        self.loss = Loss(
            **{
                n: (torch.tensor(v, dtype=torch.float64), u, f)
                for n, (v, u, f) in state["loss"].items()
            }
        )
        self.units, self.norm, self.updates = dict(state["units"]), state["norm"], state["updates"]


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the `state_dict`s of one trainable's metrics, given in the order of the ranks."""
    losses: dict[str, tuple[float, str, float]] = {}
    for state in states:
        for name, (value, unit, factor) in state["loss"].items():
            losses[name] = (losses[name][0] + value if name in losses else value, unit, factor)
    return {**states[0], "loss": losses}


def training_metrics(
    states: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float], model: str
) -> dict[str, float]:
    """Returns what is logged of all trainables: mean losses and terms, learning rate, norm.

    Args:
        states: the merged state of each trainable's meter.
        rates: learning rates.
        model: the trainable whose names get no prefix.
    """
    values: dict[str, float] = {}
    for name, state in states.items():
        if not state["updates"]:  # all of them were skipped
            continue
        losses = means([state["loss"]], state["units"])
        prefix = "train/" if name == model else f"train/{name}_"
        values[f"{prefix}loss"] = losses.pop("loss")
        values[f"{prefix}lr"] = rates[name]
        values[f"{prefix}grad_norm"] = state["norm"] / state["updates"]
        values |= {f"train/{key}": value for key, value in losses.items()}
    return values
