"""Typed configs: dataclass fields with a range, and the conversion of a composed config."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar

from cosyexp.errors import UserError

Config = TypeVar("Config")
LARGEST = 10**18  # whole numbers have 64 bits in data and tensors
Node = dict[str, Any]  # a config node with a _target_, or one of free keys


def setting(
    default: Any = MISSING,
    *,
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    words: tuple[str, ...] = (),
    hint: str = "",
) -> Any:
    """Returns a dataclass field with a range: >= ge, > gt, <= le, < lt.

    Args:
        default: the default value; the field is required if it is missing.
        default_factory: makes the default value instead; the range of a list is that of its items.
        words: strings that are allowed besides whole numbers in a field of type Any.
        hint: what to do about a value outside the range.
    """
    bounds = {">=": ge, ">": gt, "<=": le, "<": lt}
    given = {sign: bound for sign, bound in bounds.items() if bound is not None}
    metadata = {"bounds": given, "words": words, "hint": hint}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(schema: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Converts a resolved config to a dataclass, and checks it.

    Args:
        schema: the dataclass.
        values: its keys, nested; an interpolation is taken as it is written, as text.
        prefix: of the keys in messages, such as "engine.".

    Raises:
        UserError: a value is outside its range.
        omegaconf.errors.OmegaConfBaseException: a key is unknown, or a value has another type.
    """
    from omegaconf import OmegaConf

    parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), literal(values)))
    assert isinstance(parsed, schema)
    for path, value, metadata in _leaves(parsed, prefix):
        _check_range(path, value, metadata)
    if check := getattr(parsed, "check", None):
        check()
    return parsed


def literal(node: Any) -> Any:
    """Returns a config in which `${` is only text, in OmegaConf's grammar."""
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", node)
    if isinstance(node, Mapping):
        return {key: literal(value) for key, value in node.items()}
    return [literal(value) for value in node] if isinstance(node, list | tuple) else node


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as plain dicts, lists, numbers and strings."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for f in fields(config):
        value, path = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value, f.metadata
            yield from _inner(path, value)


def _inner(path: str, value: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yields the numbers in a node that stays plain; they have no range here, but are finite."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inner(f"{path}.{key}", item)
            yield f"{path}.{key}", item, {}
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _inner(f"{path}[{i}]", item)
            yield f"{path}[{i}]", item, {}


def _check_range(path: str, value: Any, metadata: Mapping[str, Any]) -> None:
    bounds, words = metadata.get("bounds", {}), metadata.get("words", ())
    if (value is None and not words) or (isinstance(value, str) and value in words):
        return
    if isinstance(value, list) and bounds and not words:
        for i, item in enumerate(value):
            _check_range(f"{path}[{i}]", item, metadata)
        return
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{path}={value} must be a number up to {LARGEST:g}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}={value} must be a finite number")
    wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items())
    hint = f": {metadata['hint']}" if metadata.get("hint") else ""
    if bounds and (isinstance(value, bool) or not isinstance(value, int if words else int | float)):
        number = f"{' or '.join(words)} or a whole number" if words else "a number"
        raise UserError(f"{path}={value} must be {number} {wanted}{hint}")
    holds = {
        ">=": lambda bound: value >= bound,
        ">": lambda bound: value > bound,
        "<=": lambda bound: value <= bound,
        "<": lambda bound: value < bound,
    }
    if not all(holds[sign](bound) for sign, bound in bounds.items()):
        raise UserError(f"{path}={value} must be {wanted}{hint}")
