"""The mean of several files of weights, one tensor at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.run.tensors import TensorFile, write_tensors


def average(files: Sequence[Path], out: Path) -> None:
    """Writes the mean of each floating-point tensor, added in at least fp32 and kept in its own type.

    Integers and booleans are those of the last file. Memory: two copies of the largest tensor.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(TensorFile(path)) for path in files]
        shapes = {name: sources[-1].shape(name) for name in sources[-1].keys()}  # noqa: SIM118
        for source in sources:
            if {name: source.shape(name) for name in source.keys()} != shapes:  # noqa: SIM118
                raise UserError(f"{source.path} holds other tensors than {sources[-1].path}: they cannot be averaged")
        write_tensors(out, shapes, _means(sources, list(shapes)))


def _means(sources: Sequence[TensorFile], names: Sequence[str]) -> Iterator[Tensor]:
    for name in names:
        yield _mean(sources, name)  # nothing of one tensor is held while the next is read


def _mean(sources: Sequence[TensorFile], name: str) -> Tensor:
    newest = sources[-1][name]
    if not newest.is_floating_point():
        return newest
    total = newest.to(torch.promote_types(newest.dtype, torch.float32))
    for source in sources[:-1]:
        total += source[name]
    return total.div_(len(sources)).to(newest.dtype)
