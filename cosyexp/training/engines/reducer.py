"""Sums gradients over the ranks while the backward that brings them goes on."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 * 2**20  # bytes of gradients that travel together


class Reducer:
    """One all-reduce per bucket of parameters, in the same order on every rank, each as soon as its gradients are complete.

    In a backward that was announced as the last one, a bucket leaves when all its gradients and all buckets before it are there.
    `finish` sends what has not left, with zeros for a parameter that no backward of this rank has used, and waits for all of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int = BUCKET) -> None:
        self.buckets = list(buckets(parameters[::-1], size))  # the backward comes from the end
        self.bucket_of = {
            parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket
        }
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self.is_last = False
        self._forget()

    def _forget(self) -> None:
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, Any]] = []

    def _arrived(self, parameter: Tensor) -> None:
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
        self._forget()


def buckets(tensors: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Neighbours of one dtype, together of about `size` bytes; the same on every rank."""
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
