"""Computes a weighted mean of files of weights, one piece of a tensor at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.run.adapters import note_in
from cosyexp.run.pickles import open_weights, write_pickle
from cosyexp.run.tensors import Shapes, TensorFile, write_tensors

# Numbers that are added at once. They fit in the CPU cache, and torch starts no threads for so few.
PIECE = 2**15
Part = tuple[Path, float]  # a file, and the factor of its weights


def combine(
    parts: Sequence[Part], divisor: float, newest: Path, out: Path, pickled: bool = False
) -> None:
    """Writes sum(factor * weights) / divisor for each floating-point tensor.

    Sums are in fp32, or in fp64 for tensors that are fp64 in some file. A tensor that has two names
    in all files is written once. Takes about a megabyte of memory. Of adapters, the factors are
    averaged, not their products, which would have a higher rank.

    Args:
        parts: the files, each with its factor.
        divisor: what the sum is divided by.
        newest: file that the names, the types, and the integer and boolean tensors are taken from.
        out: file to write.
        pickled: write it as torch.save does, instead of as safetensors.

    Raises:
        UserError: the files hold different tensors or adapters to different bases, a value is not
            finite, the result is too large for its type, or an adapter is to be pickled.
    """
    with ExitStack() as stack:
        like = stack.enter_context(open_weights(newest))
        sources = [(stack.enter_context(open_weights(path)), factor) for path, factor in parts]
        for source, _ in sources:
            _refuse_other(source, like)
        same = _aliases([like, *(source for source, _ in sources)])
        names = like.keys()
        shapes = {name: like.shape(name) for name in names if name not in same}
        pieces = _pieces(sources, divisor, like, shapes)
        note = note_in(like)
        if pickled and note:
            raise UserError(
                f"{newest} is an adapter, which a .pt file cannot hold: give output=<x>.safetensors"
            )
        if pickled:
            write_pickle(out, shapes, pieces, same)
        else:
            write_tensors(out, shapes, pieces, note.metadata() if note else None, same)


def _floats(file: TensorFile) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    names = file.keys()
    return {name: file.shape(name) for name in names if file.shape(name)[0].is_floating_point}


def _refuse_other(source: TensorFile, like: TensorFile) -> None:
    """Checks that a file has the same tensors and base as `like`, in the same or wider types.

    Raises:
        UserError: it does not.
    """
    if note_in(source) != note_in(like):
        raise UserError(
            f"{source.path} and {like.path} are not adapters to the same base: average checkpoints "
            f"of one run"
        )
    found, wanted = _floats(source), _floats(like)
    for name in sorted({*found, *wanted}):
        fits = name in found and name in wanted and found[name][1] == wanted[name][1]
        if not fits or torch.promote_types(found[name][0], wanted[name][0]) != found[name][0]:
            raise UserError(
                f"{source.path} holds other tensors than {like.path} (such as {name}): average "
                f"checkpoints of one model"
            )


def _aliases(files: Sequence[TensorFile]) -> dict[str, str]:
    """Returns second names of tensors that share storage in all files, with the first name."""
    first: dict[object, str] = {}
    names = files[0].keys()
    keys = {name: tuple(file.storage_key(name) for file in files if name in file) for name in names}
    return {
        name: before for name in names if (before := first.setdefault(keys[name], name)) != name
    }


def _pieces(
    sources: Sequence[tuple[TensorFile, float]], divisor: float, like: TensorFile, shapes: Shapes
) -> Iterator[Tensor]:
    """Yields the averaged tensors in the order of `shapes`, as consecutive flat pieces."""
    buffer, totals = bytearray(PIECE * 8), torch.empty(PIECE, dtype=torch.float64)
    for name, (dtype, shape) in shapes.items():
        count = math.prod(shape)
        sum_dtype = torch.float32
        for source, _ in sources if dtype.is_floating_point else ():
            sum_dtype = torch.promote_types(sum_dtype, source.shape(name)[0])
        for begin in range(0, max(count, 1), PIECE):
            size = min(PIECE, count - begin)
            if not dtype.is_floating_point:
                yield like.piece(name, begin, size, buffer)
                continue
            total = totals.view(sum_dtype)[:size]
            for i, (source, factor) in enumerate(sources):
                piece = source.piece(name, begin, size, buffer)
                if i == 0:
                    total.copy_(piece).mul_(factor)
                else:
                    total.add_(piece, alpha=factor)
            result = total.div_(divisor).to(dtype)
            if not is_finite(result):
                files = [source for source, _ in sources]
                raise _nonfinite(files, name, begin, size, buffer)
            yield result


def is_finite(values: Tensor) -> bool:
    """Returns whether all numbers are finite, at the cost of their sum."""
    return math.isfinite(values.sum()) or bool(values.isfinite().all())


def _nonfinite(
    files: Sequence[TensorFile], name: str, begin: int, size: int, buffer: bytearray
) -> UserError:
    """Returns an error that names the file in which a piece of a tensor is not finite."""
    for file in files:
        if not is_finite(file.piece(name, begin, size, buffer)):
            return UserError(
                f"{file.path} holds values that are not finite (in {name}): its training diverged, "
                f"so average other checkpoints"
            )
    return UserError(
        f"the average of {name} is too large for its type in {files[0].path}: average checkpoints "
        f"of a wider type"
    )
