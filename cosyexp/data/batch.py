"""What an objective gets: padded tensors of a few utterances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Base of the batches; a subclass adds tensors, batch dimension first.

    utts: the utterances, in the order of the rows.
    """

    utts: tuple[str, ...]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: function(x) for name, x in values.items() if isinstance(x, Tensor)
        }
        return replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def double(self) -> Self:
        """The same in fp64, for checks that want more digits than fp32 has."""
        return self._map(lambda x: x.double() if x.is_floating_point() else x)

    def __len__(self) -> int:
        return len(self.utts)


def pad(rows: Sequence[np.ndarray]) -> Tensor:
    """Stacks arrays along a new first dimension, with zeros behind the shorter ones (last dimension)."""
    out = np.zeros(
        (len(rows), *rows[0].shape[:-1], max(row.shape[-1] for row in rows)), rows[0].dtype
    )
    for target, row in zip(out, rows, strict=True):
        target[..., : row.shape[-1]] = row
    return torch.from_numpy(out)


def lengths(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor([row.shape[-1] for row in rows])
