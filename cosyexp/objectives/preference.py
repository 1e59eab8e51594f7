"""Preference training of a speech-token language model, such as DPO.

P pairs, B = 2 P rows: the chosen answers of all pairs, then the rejected ones. L text tokens, N
speech tokens, E speaker embedding, T input positions, A labels, V classes.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.arguments import Finite, Positive, Share
from cosyexp.data.collators.preference import PreferenceBatch
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable
from cosyexp.objectives.losses import preference
from cosyexp.objectives.losses.cross_entropy import at, hits, log_probabilities
from cosyexp.registry import register

LOSSES = ("dpo", "cdpo", "ipo", "hinge", "simpo")


@register("objective")
class Preference:
    """Makes chosen answers more likely than rejected ones (Rafailov et al. 2023, "DPO").

    Apart from SimPO, the losses compare the trained model, the policy, with a frozen reference
    model. Dropout is turned off in the network.

    Args:
        network: the language model.
        optimizer: makes the optimizer, see `Trainable`.
        scheduler: the learning-rate schedule, see `Trainable`.
        loss: dpo, cdpo, ipo, hinge or simpo; see `losses/preference.py`. simpo needs no reference.
        beta: scale of the rewards.
        smoothing: for cdpo, the assumed share of pairs whose preference is the wrong way round.
        margin: for simpo, the margin by which the chosen answer should win.
        normalize: "length" uses the mean of the log-probabilities of an answer's labels, "sum"
            their sum.
        sft_weight: weight of the cross-entropy of the chosen answers, which is added to the loss.
        cache_reference: take the log-probabilities of the reference from the batch instead of
            computing them with `frozen_modules[0]`.

    Raises:
        ValueError: `loss` or `normalize` is unknown.
    """

    units = ("pairs", "tokens")
    reference_settings = ("_target_", "normalize")

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Any,
        scheduler: Any,
        loss: str = "dpo",
        beta: Positive = 5.0,
        smoothing: Share = 0.0,
        margin: Finite = 2.5,
        normalize: str = "length",
        sft_weight: float = 1.0,
        cache_reference: bool = False,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"objective.loss={loss} is unknown: give one of {', '.join(LOSSES)}")
        if normalize not in ("length", "sum"):
            raise ValueError(f"objective.normalize={normalize} is unknown: give length or sum")
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
        """Returns a frozen copy of the policy, for the weights of the reference."""
        return copy.deepcopy(self.trainables["llm"].module).eval().requires_grad_(False)

    def count_units(self, batch: PreferenceBatch) -> dict[str, int]:
        """Counts the pairs, and the labels of the chosen answers."""
        return {"pairs": len(batch), "tokens": int(batch.label_lens_B[: len(batch)].sum())}

    def losses(self, batch: PreferenceBatch) -> Iterator[Loss]:
        """Yields the loss of the policy."""
        yield self._loss(batch)

    def validate(self, batch: PreferenceBatch) -> Loss:
        """Returns the loss, as in training."""
        return self._loss(batch)

    def preview(self, batch: PreferenceBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        """Yields nothing, as speech tokens alone can be neither shown nor played."""
        return iter(())

    @torch.no_grad()
    def reference(self, batch: PreferenceBatch, network: nn.Module) -> Tensor:
        """Returns the log-probability of each answer under a network, (B,)."""
        logp_BA, _ = self._label_logps(network, batch)
        return self._answer_logps(logp_BA, batch)

    def _loss(self, batch: PreferenceBatch) -> Loss:
        pairs = len(batch)
        logp_BA, hits_chosen = self._label_logps(self.trainables["llm"], batch)
        policy_B = self._answer_logps(logp_BA, batch)
        reference_B = batch.reference_B
        if self.frozen_modules:
            reference_B = self.reference(batch, self.frozen_modules[0])
        log_ratio_B = policy_B - reference_B.to(policy_B.dtype)
        chosen, rejected = log_ratio_B[:pairs], log_ratio_B[pairs:]
        margin = self.beta * (chosen - rejected).detach()
        return Loss(
            dpo_loss=(self.loss(chosen - rejected).sum(), "pairs", 1.0),
            sft_loss=(-logp_BA[:pairs].sum(), "tokens", self.sft_weight),
            acc=(hits_chosen, "tokens", 0.0),
            accuracy=(preference.wins(margin).sum(), "pairs", 0.0),
            chosen_reward=(self.beta * chosen.detach().sum(), "pairs", 0.0),
            rejected_reward=(self.beta * rejected.detach().sum(), "pairs", 0.0),
            margin=(margin.sum(), "pairs", 0.0),
        )

    def _label_logps(self, network: Any, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Computes the log-probability of every label.

        Returns:
            The log-probabilities (B, A), 0 at padding, and the number of labels of the chosen
            answers that are the most likely class.
        """
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

    def _answer_logps(self, logp_BA: Tensor, batch: PreferenceBatch) -> Tensor:
        """Sums or averages the log-probabilities of the labels of each answer, (B,)."""
        return logp_BA.sum(1) / (batch.label_lens_B if self.by_length else 1)
