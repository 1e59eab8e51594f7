"""Finds updates whose gradients were not finite, without making the device wait for the host.

The engine has blocked such an update already; here it is decided what that means, one step late on CUDA.
"""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cosyexp.config import OnNonfinite, Precision
from cosyexp.errors import UserError
from cosyexp.objectives.base import Loss
from cosyexp.run.files import write_json
from cosyexp.training.engines.base import StepReport
from cosyexp.training.metrics import to_host

log = logging.getLogger(__name__)
PATIENCE = 10  # updates in a row that may be skipped


@dataclass(frozen=True)
class Update:
    """What one trainable's update was made of on this rank. applied: the flag, on its way to the host; copied: when it is there."""

    step: int
    trainable: str
    utts: tuple[str, ...]
    losses: Sequence[Loss]
    report: StepReport
    applied: Tensor
    copied: torch.cuda.Event | None

    def was_applied(self) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.applied)


class NonFiniteGuard:
    """Raises for an update that was not finite; with fp16, or where the user wants them skipped, only for `PATIENCE` in a row.

    With fp16 a gradient may overflow, and lowers the loss scale; a loss may not. dumps: the folder for what a bad update saw.
    """

    def __init__(self, dumps: Path, rank: int, precision: Precision, policy: OnNonfinite) -> None:
        self.dumps, self.rank = dumps, rank
        self.skips, self.scales = policy is OnNonfinite.skip, precision is Precision.fp16
        self.may_skip = self.skips or self.scales
        self._pending: deque[Update] = deque()
        self._in_a_row: Counter[str] = Counter()  # skipped updates of each trainable

    def add(
        self,
        step: int,
        trainable: str,
        utts: tuple[str, ...],
        losses: Sequence[Loss],
        report: StepReport,
    ) -> None:
        applied, copied = report.applied, None
        if applied.is_cuda:
            applied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(
                applied, non_blocking=True
            )
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(Update(step, trainable, utts, losses, report, applied, copied))

    def check(self, before: int) -> bool:
        """Whether all updates of steps before `before` were applied; UserError where one that was not ends the run."""
        sound = True
        while self._pending and self._pending[0].step < before:
            update = self._pending.popleft()
            if update.was_applied():
                self._in_a_row[update.trainable] = 0
            else:
                self._in_a_row[update.trainable] += 1
                sound = False
                self._handle(update)
        return sound

    def _handle(self, update: Update) -> None:
        losses = [
            {name: value for name, (value, *_) in to_host(loss).items()} for loss in update.losses
        ]
        finite = all(torch.isfinite(torch.tensor(list(loss.values()))).all() for loss in losses)
        path = self.dumps / f"nonfinite_step_{update.step}.{update.trainable}.rank_{self.rank}.json"
        norm = float(update.report.grad_norm)
        write_json(path, {"grad_norm": norm, "losses": losses, "utterances": update.utts})
        if (self.skips or (self.scales and finite)) and self._in_a_row[update.trainable] < PATIENCE:
            log.warning(
                "step %d: the update of %s was skipped, its gradient norm is %s",
                update.step,
                update.trainable,
                norm,
            )
            return
        raise UserError(
            f"at step {update.step} the {'gradients' if finite else 'loss'} of {update.trainable} stopped being finite, the weights "
            f"were kept; {path} names the utterances: look at them, lower the learning rate, or set trainer.on_nonfinite=skip"
        )
