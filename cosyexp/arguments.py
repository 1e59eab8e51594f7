"""Checks the values of a class's arguments by their annotations, before anything is built.

A whole number must be >= 1 and a fraction >= 0, unless the annotation has another `Range`:

    def __init__(self, *, heads: int, dropout: Share = 0.0, offset: Annotated[float, Range()] = 0.0)

Values of other types than numbers, booleans, strings and sequences of them are not checked.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

LARGEST = 1e9  # of a whole number without a range of its own


@dataclass(frozen=True)
class Range:
    """The range of a number: >= ge, > gt, <= le, < lt; None: no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return " and ".join(f"{sign} {b:g}" for sign, b in bounds.items() if b is not None)


Count = Annotated[int, Range(ge=0, le=LARGEST)]
Share = Annotated[float, Range(ge=0, le=1)]
Fraction = Annotated[float, Range(ge=0, lt=1)]
Positive = Annotated[float, Range(gt=0)]
ANY = Range()
Finite = Annotated[float, ANY]
DEFAULTS = {int: Range(ge=1, le=LARGEST), float: Range(ge=0)}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

# torch's optimizers check their numbers too, but not whether they are numbers
OPTIMIZER: dict[str, Any] = {
    "lr": float,
    "betas": tuple[Fraction, Fraction],
    "eps": float,
    "weight_decay": float,
    "momentum": Share,
    "dampening": Share,
    "alpha": Fraction,
    "lr_decay": float,
    "momentum_decay": float,
    "initial_accumulator_value": float,
}


def annotations(found: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of all arguments; a class that passes **options has its base's."""
    parameters = inspect.signature(found).parameters.values()
    own = {p.name: p.annotation for p in parameters if p.kind is not p.VAR_KEYWORD}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters) and inspect.isclass(found)
    base = found.__base__ if passes_on else None  # type: ignore[attr-defined]
    return own if base in (None, object) else {**annotations(base), **own}


def problem(value: Any, annotation: Any, strict: bool = True) -> str | None:
    """Returns what a value of an argument must be, such as "must be a number >= 0"; None if it is.

    Args:
        value: as it stands in a config.
        annotation: of the argument.
        strict: whether numbers without a `Range` have the usual one of their type.
    """
    return _problem(value, annotation, None if strict else ANY)


def _problem(value: Any, annotation: Any, limits: Range | None) -> str | None:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [item for item in args[1:] if isinstance(item, Range)]
        return _problem(value, args[0], ranges[0] if ranges else limits)
    if origin in (UnionType, Union):
        found = [_problem(value, arm, limits) for arm in args]
        # what is wrong with the arm of the value's type says most
        return None if None in found else next(text for text in found if text != "must be null")
    if annotation in NAMES:
        return _scalar_problem(value, annotation, limits)
    if annotation in (NoneType, None):
        return None if value is None else "must be null"
    if inspect.isclass(origin) and issubclass(origin, Sequence) and args:
        return _sequence_problem(value, origin, args, limits)
    return None


def _scalar_problem(value: Any, kind: type, limits: Range | None) -> str | None:
    if isinstance(value, Mapping):  # a node, which is checked on its own
        return None
    limits = limits or DEFAULTS.get(kind, ANY)
    wanted = f"must be {NAMES[kind]} {limits}".rstrip()
    if isinstance(value, bool) or kind in (bool, str):
        return None if type(value) is kind else wanted
    if not isinstance(value, int if kind is int else int | float):
        return wanted
    if kind is float and not abs(value) <= 1e300:  # NaN, infinity, and whole numbers beyond
        return f"must be a finite number {limits}".rstrip()
    return None if value in limits else wanted


def _sequence_problem(
    value: Any, origin: type, args: tuple[Any, ...], limits: Range | None
) -> str | None:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return "must be a list"
    fixed = origin is tuple and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        return f"must be a list of {len(args)} values"
    kinds = args if fixed else [args[0]] * len(value)
    found = (_problem(item, kind, limits) for item, kind in zip(value, kinds, strict=True))
    text = next((text for text in found if text), None)
    return text and f"{text.replace('must be', 'must be a list in which each is', 1)}"
