"""The language of `filter=`: comparisons of the measures of a recording, joined by and, or, not."""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cosyexp.data.quality import MEASURES
from cosyexp.errors import UserError

LONGEST = 1000  # characters
WORDS = ("utt", "speaker", "text")
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda part, whole: part in whole,
    ast.NotIn: lambda part, whole: part not in whole,
}


class Filter:
    """Which recordings are kept, such as `snr > 15 and (wer < 0.3 or cps > 4)`.

    It is parsed as a Python expression of names, numbers, strings, comparisons, and, or, not and
    parentheses, and is never run as Python. A comparison with a value that is missing is false.

    Args:
        text: the expression; empty: all are kept.

    Attributes:
        names: the fields that it reads.

    Raises:
        UserError: it is anything else.
    """

    def __init__(self, text: str) -> None:
        try:
            if len(text) > LONGEST:
                raise ValueError(f"it is longer than {LONGEST} characters")
            self.tree = ast.parse(text.strip() or "0 == 0", mode="eval").body
            self.names = sorted(set(_check(self.tree)))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise UserError(
                f"filter={text[:LONGEST]!r} cannot be read ({reason}): compare fields, such as "
                f"'snr > 15 and wer < 0.3'; fields are {', '.join((*MEASURES, *WORDS))}"
            ) from None

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Returns whether a recording is kept.

        Args:
            row: values by field.
        """
        return bool(_value(self.tree, row))

    def reason(self, row: Mapping[str, Any]) -> str:
        """Returns why a recording is left out: the fields that the filter reads."""
        values = ((name, row.get(name)) for name in self.names)
        shown = (f"{n}={v:.4g}" if isinstance(v, int | float) else f"{n}={v}" for n, v in values)
        return f"left out by the filter: {', '.join(shown)}"


def _check(node: ast.AST) -> Iterator[str]:
    """Yields the fields of a condition; raises a ValueError if it is not one."""
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                yield from _check(value)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from _check(operand)
        case ast.Compare(left=left, ops=ops, comparators=others):
            if any(type(op) not in COMPARISONS for op in ops):
                raise ValueError("it has another comparison than < <= > >= == != in")
            kinds = {kind for value in (left, *others) for kind in _kinds(value)}
            if kinds != {"number"} and kinds != {"text"}:
                raise ValueError("it compares a number with a text")
            if kinds == {"number"} and any(isinstance(op, ast.In | ast.NotIn) for op in ops):
                raise ValueError("`in` looks for a text in a text")
            yield from (value.id for value in (left, *others) if isinstance(value, ast.Name))
        case _:
            raise ValueError(f"{ast.unparse(node)} is not a comparison")


def _kinds(node: ast.AST) -> Iterator[str]:
    """Yields whether a value is a number or a text; raises a ValueError if it is neither."""
    match node:
        case ast.Name(id=name) if name in MEASURES or name in WORDS:
            yield "text" if name in WORDS else "number"
        case ast.Name(id=name):
            raise ValueError(f"there is no field {name}")
        case ast.Constant(value=str()):
            yield "text"
        case ast.Constant(value=bool()):
            raise ValueError("True and False are not numbers")
        case ast.Constant(value=int() | float()):
            yield "number"
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            yield "number"
        case _:
            raise ValueError(f"{ast.unparse(node)} is neither a field, a number nor a text")


def _value(node: Any, row: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_value(value, row) for value in node.values)
        case ast.BoolOp():
            return any(_value(value, row) for value in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, row)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, row)
        case ast.Name():
            return row.get(node.id)
        case ast.Constant():
            return node.value
    values = [_value(value, row) for value in (node.left, *node.comparators)]
    return None not in values and all(
        COMPARISONS[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False)
    )
