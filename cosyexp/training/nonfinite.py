"""Detects updates whose gradients were not finite, and skips them or stops the run.

The engine has already blocked such an update on the device. The guard reads the result one step
later on CUDA, so that the device never waits for the host.
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
from cosyexp.run.files import below, write_json
from cosyexp.training.engines.base import StepReport
from cosyexp.training.meters import to_host

log = logging.getLogger(__name__)
PATIENCE = 10  # the run stops at this many consecutive non-finite updates of a trainable


@dataclass(frozen=True)
class Update:
    """One trainable's update, as this rank saw it.

    Args:
        step: the step of the update.
        trainable: name of the trainable.
        utts: the utterances of this rank's micro-batches.
        losses: the losses of this rank's micro-batches.
        report: what the engine returned.
        applied: whether the update was applied; on CUDA it is being copied to the host.
        copied: the event after which `applied` can be read, or None if it can be read at once.
    """

    step: int
    trainable: str
    utts: tuple[str, ...]
    losses: Sequence[Loss]
    report: StepReport
    applied: Tensor
    copied: torch.cuda.Event | None

    def was_applied(self) -> bool:
        """Returns whether the weights were updated; waits until that is known."""
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.applied)


class NonFiniteGuard:
    """Stops the run at an update that was not finite, unless such updates may be skipped.

    With `policy=skip` all of them may be skipped. With fp16 those whose losses are finite may be
    skipped, as an overflow of the gradients only lowers the loss scale. In any case the run stops
    at the `PATIENCE`th consecutive one of a trainable.

    Args:
        dumps: folder for a JSON file about each non-finite update: norm, losses and utterances.
        rank: of this process.
        precision: of the run.
        policy: whether the user wants non-finite updates skipped.
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
        """Registers an update for `check`; the arguments are those of `Update`."""
        applied, copied = report.applied, None
        if applied.is_cuda:
            applied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(
                applied, non_blocking=True
            )
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(Update(step, trainable, utts, losses, report, applied, copied))

    def check(self, before: int) -> bool:
        """Checks the registered updates of all steps before a given step.

        Args:
            before: the step.

        Returns:
            Whether all of these updates were applied.

        Raises:
            UserError: an update was not finite and may not be skipped.
        """
        all_applied = True
        while self._pending and self._pending[0].step < before:
            update = self._pending.popleft()
            if update.was_applied():
                self._in_a_row[update.trainable] = 0
            else:
                self._in_a_row[update.trainable] += 1
                all_applied = False
                self._handle(update)
        return all_applied

    def _handle(self, update: Update) -> None:
        losses = [
            {name: value for name, (value, *_) in to_host(loss).items()} for loss in update.losses
        ]
        finite = all(torch.isfinite(torch.tensor(list(loss.values()))).all() for loss in losses)
        name = f"nonfinite_step_{update.step}.{update.trainable}.rank_{self.rank}.json"
        path = below(self.dumps, name)
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
        culprit = "gradients" if finite else "loss"
        raise UserError(
            f"at step {update.step} the {culprit} of {update.trainable} became NaN or infinite "
            f"(the weights were kept; {path} lists the utterances): inspect the utterances, lower "
            f"the learning rate, or set trainer.on_nonfinite=skip"
        )
