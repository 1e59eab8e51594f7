"""Direct preference optimisation of a speech-token language model (Rafailov et al. 2023).

P pairs, B rows: [chosen_1..P, rejected_1..P], A answers of a row.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.data.collators.preference import PreferenceBatch
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable
from cosyexp.objectives.losses import preference
from cosyexp.objectives.losses.cross_entropy import at, hits, log_probabilities

LOSSES = ("dpo", "cdpo", "ipo", "hinge", "simpo")


class Preference:
    """The chosen answer is to become likelier than the rejected one, measured against a frozen reference.

    loss: dpo, cdpo, ipo, hinge or simpo, see `losses/preference.py`; simpo has no reference. beta, smoothing (cdpo), margin (simpo): of it.
    normalize: "length", an answer counts by the mean log-probability of its tokens and its end; "sum", by their sum.
    sft_weight: of the cross-entropy of the chosen answers beside it. There is no dropout.
    cache_reference: the log-probabilities of the reference come with the batch.
    """

    units = ("pairs", "tokens")

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Any,
        scheduler: Any,
        loss: str = "dpo",
        beta: float = 5.0,
        smoothing: float = 0.0,
        margin: float = 2.5,
        normalize: str = "length",
        sft_weight: float = 1.0,
        cache_reference: bool = False,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"objective.loss={loss} is none of {', '.join(LOSSES)}")
        if normalize not in ("length", "sum"):
            raise ValueError(f"objective.normalize={normalize} is neither length nor sum")
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.by_length, self.beta, self.sft_weight = normalize == "length", beta, sft_weight
        self.loss = {
            "dpo": partial(preference.dpo, beta=beta),
            "cdpo": partial(preference.dpo, beta=beta, smoothing=smoothing),
            "ipo": partial(preference.ipo, beta=beta),
            "hinge": partial(preference.hinge, beta=beta),
            "simpo": partial(preference.simpo, beta=beta, margin=margin),
        }[loss]
        self.needs_reference, self.cache_reference = loss != "simpo", cache_reference
        self.frozen_modules: list[nn.Module] = []
        self.trainables: Mapping[str, Trainable] = {"llm": Trainable(network, optimizer, scheduler)}

    def frozen_copy(self) -> nn.Module:
        """A network like the policy, to hold the weights of the reference."""
        return copy.deepcopy(self.trainables["llm"].module).eval().requires_grad_(False)

    def count_units(self, batch: PreferenceBatch) -> dict[str, int]:
        return {"pairs": len(batch), "tokens": int(batch.label_lens_B[: len(batch)].sum())}

    def losses(self, batch: PreferenceBatch) -> Iterator[Loss]:
        yield self._loss(batch)

    def validate(self, batch: PreferenceBatch) -> Loss:
        return self._loss(batch)

    def preview(self, batch: PreferenceBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        return iter(())

    @torch.no_grad()
    def reference(self, batch: PreferenceBatch, network: nn.Module) -> Tensor:
        """The log-probability that a network gives to each row, (B,)."""
        logp_BA, _ = self._answers(network, batch)
        return self._whole(logp_BA, batch)

    def _loss(self, batch: PreferenceBatch) -> Loss:
        pairs = len(batch)
        logp_BA, hits_P = self._answers(self.trainables["llm"], batch)
        policy_B = self._whole(logp_BA, batch)
        reference_B = batch.reference_B
        if self.frozen_modules:
            reference_B = self.reference(batch, self.frozen_modules[0])
        gain_B = policy_B - reference_B.to(policy_B.dtype)
        chosen, rejected = gain_B[:pairs], gain_B[pairs:]
        margin = self.beta * (chosen - rejected).detach()
        return Loss(
            dpo_loss=(self.loss(chosen - rejected).sum(), "pairs", 1.0),
            sft_loss=(-logp_BA[:pairs].sum(), "tokens", self.sft_weight),
            acc=(hits_P, "tokens", 0.0),
            accuracy=(preference.wins(margin).sum(), "pairs", 0.0),
            chosen_reward=(self.beta * chosen.detach().sum(), "pairs", 0.0),
            rejected_reward=(self.beta * rejected.detach().sum(), "pairs", 0.0),
            margin=(margin.sum(), "pairs", 0.0),
        )

    def _answers(self, network: Any, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The log-probability of every answer, 0 behind a row's last one, and how many of the chosen ones are the likeliest."""
        logits_BAV = network(
            batch.text_BL,
            batch.text_lens_B,
            batch.speech_BN,
            batch.speaker_BE,
            batch.gather_index_BT,
            batch.lens_B,
            batch.label_positions_BA,
        )
        valid_BA, pairs = valid_mask(batch.label_lens_B, batch.labels_BA.size(1)), len(batch)
        logp_BA = at(log_probabilities(logits_BAV), batch.labels_BA) * valid_BA
        return logp_BA, hits(logits_BAV[:pairs], batch.labels_BA[:pairs], valid_BA[:pairs])

    def _whole(self, logp_BA: Tensor, batch: PreferenceBatch) -> Tensor:
        return logp_BA.sum(1) / (batch.label_lens_B if self.by_length else 1)
