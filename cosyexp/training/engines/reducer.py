"""Sums gradients over ranks while the backward pass still computes others."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 * 2**20  # bytes of gradients in one all-reduce


class Reducer:
    """Sums the gradients of some parameters over ranks, in buckets.

    The order of the buckets is the same on every rank. In a backward pass during which `is_last` is
    set, a bucket is sent as soon as all its gradients and those of the buckets before it are
    complete. `finish` sends the rest.

    Args:
        parameters: the parameters.
        size: bytes of gradients in a bucket.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int = BUCKET) -> None:
        # reversed, as the backward pass computes the gradients of the last parameters first
        self.buckets = list(buckets(parameters[::-1], size))
        self.bucket_of = {
            parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket
        }
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self.is_last = False
        self._reset()

    def _reset(self) -> None:
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, Any]] = []

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self.is_last:
            return
        self.missing[self.bucket_of[parameter]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        gradients = []
        for parameter in self.buckets[len(self.sent)]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad.flatten())
        flat = torch.cat(gradients)
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Sends the remaining buckets, waits for all of them, and stores the sums as gradients.

        A parameter that no backward pass of this rank used counts with zeros.
        """
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            for parameter, part in zip(
                bucket, flat.split([parameter.numel() for parameter in bucket]), strict=True
            ):
                assert parameter.grad is not None
                parameter.grad.copy_(part.view_as(parameter))
        self.is_last = False
        self._reset()


def buckets(tensors: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Groups consecutive tensors of one dtype into buckets of at most `size` bytes.

    A tensor that is larger than that has a bucket for itself.
    """
    bucket: list[Any] = []
    for tensor in tensors:
        if bucket and (
            tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + tensor.nbytes > size
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
