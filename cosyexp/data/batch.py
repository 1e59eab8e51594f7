"""Batches: padded tensors of a few utterances, as an objective receives them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Base class of all batches; subclasses add tensors, with the batch dimension first.

    Attributes:
        utts: ids of the utterances, in the order of the rows.
    """

    utts: tuple[str, ...]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: function(x) for name, x in values.items() if isinstance(x, Tensor)
        }
        return replace(self, **changed)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the content for pickle, with arrays instead of tensors.

        Tensors would go from a worker to the trainer through shared memory, with an open file each.
        A container has little of one and a shell few of the other, and a worker that runs out of
        them may stand still for ever.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x.numpy() if isinstance(x, Tensor) else x for name, x in values.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the content that `__getstate__` returned."""
        for name, x in state.items():
            value = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            object.__setattr__(self, name, value)

    def to(self, device: torch.device) -> Self:
        """Copies all tensors to a device, without blocking the host where memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copies all tensors to pinned memory; called by torch's `DataLoader`."""
        return self._map(Tensor.pin_memory)

    def twice(self) -> Self:
        """Returns a batch of all rows, and then all rows again."""
        return replace(self._map(lambda x: torch.cat([x, x])), utts=self.utts * 2)

    def double(self) -> Self:
        """Converts floating-point tensors to fp64, for checks that need more digits than fp32."""
        return self._map(lambda x: x.double() if x.is_floating_point() else x)

    def __len__(self) -> int:
        return len(self.utts)


def pad(rows: Sequence[np.ndarray]) -> Tensor:
    """Stacks arrays along a new first dimension and pads the last dimension with zeros.

    Args:
        rows: arrays that differ at most in the size of their last dimension.
    """
    out = np.zeros(
        (len(rows), *rows[0].shape[:-1], max(row.shape[-1] for row in rows)), rows[0].dtype
    )
    for target, row in zip(out, rows, strict=True):
        target[..., : row.shape[-1]] = row
    return torch.from_numpy(out)


def lengths(rows: Sequence[np.ndarray]) -> Tensor:
    """Returns the sizes of the last dimension of the arrays, (B,) int64."""
    return torch.tensor([row.shape[-1] for row in rows])
