"""Weighted sums of files of weights, one piece of a tensor at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.run.pickles import open_weights, write_pickle
from cosyexp.run.tensors import Shapes, TensorFile, write_tensors

PIECE = (
    2**15
)  # numbers that are added at once: they stay in the processor's cache, and torch starts no threads for so few
Part = tuple[Path, float]  # a file, and what it is multiplied by


def combine(
    parts: Sequence[Part], divisor: float, newest: Path, out: Path, pickled: bool = False
) -> None:
    """Writes sum(factor * weights) / divisor of each floating-point tensor, added in fp32 (fp64 where a part is fp64).

    newest: a file whose names, types, integers and booleans are kept. pickled: as torch.save writes it, else safetensors. What is
    one tensor under two names in all files is written once. Memory: a megabyte.
    """
    with ExitStack() as stack:
        like = stack.enter_context(open_weights(newest))
        sources = [(stack.enter_context(open_weights(path)), factor) for path, factor in parts]
        for source, _ in sources:
            _refuse_other(source, like)
        same = _second_names([like, *(source for source, _ in sources)])
        shapes = {name: like.shape(name) for name in like.keys() if name not in same}  # noqa: SIM118
        pieces = _pieces(sources, divisor, like, shapes)
        if pickled:
            write_pickle(out, shapes, pieces, same)
        else:
            write_tensors(out, shapes, pieces, same=same)


def _floats(file: TensorFile) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: file.shape(name) for name in file.keys() if file.shape(name)[0].is_floating_point}  # noqa: SIM118


def _refuse_other(source: TensorFile, like: TensorFile) -> None:
    """UserError where a file has other tensors, or of a narrower type."""
    found, wanted = _floats(source), _floats(like)
    for name in sorted({*found, *wanted}):
        fits = name in found and name in wanted and found[name][1] == wanted[name][1]
        if not fits or torch.promote_types(found[name][0], wanted[name][0]) != found[name][0]:
            raise UserError(
                f"{source.path} holds other tensors than {like.path} (such as {name}): they cannot be averaged"
            )


def _second_names(files: Sequence[TensorFile]) -> dict[str, str]:
    """The names of tensors that have another one before, in all files, with that one."""
    first: dict[object, str] = {}
    names = files[0].keys()
    places = {
        name: tuple(file.storage_key(name) for file in files if name in file) for name in names
    }
    return {
        name: before for name in names if (before := first.setdefault(places[name], name)) != name
    }


def _pieces(
    sources: Sequence[tuple[TensorFile, float]], divisor: float, like: TensorFile, shapes: Shapes
) -> Iterator[Tensor]:
    buffer, totals = bytearray(PIECE * 8), torch.empty(PIECE, dtype=torch.float64)
    for name, (dtype, shape) in shapes.items():
        count = math.prod(shape)
        wide = torch.float32
        for source, _ in sources if dtype.is_floating_point else ():
            wide = torch.promote_types(wide, source.shape(name)[0])
        for begin in range(0, max(count, 1), PIECE):
            size = min(PIECE, count - begin)
            if not dtype.is_floating_point:
                yield like.piece(name, begin, size, buffer)
                continue
            total = totals.view(wide)[:size]
            for i, (source, factor) in enumerate(sources):
                piece = source.piece(name, begin, size, buffer)
                if i == 0:
                    total.copy_(piece).mul_(factor)
                else:
                    total.add_(piece, alpha=factor)
            yield total.div_(divisor).to(dtype)
