"""Conditional flow matching of mel spectrograms."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.data.collators.flow import FlowBatch
from cosyexp.models.flow.matching import euler, guided, probability_path
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable


class FlowMatchingLoss:
    """Squared error of the estimated velocity (Lipman et al. 2023, eq. 23), every mel frame weighing the same.

    guidance: strength of classifier-free guidance in previews.
    """

    frozen_modules = ()
    units = ("frames",)

    def __init__(
        self, network: nn.Module, *, optimizer: Any, scheduler: Any, guidance: float
    ) -> None:
        self.guidance = guidance
        self.trainables: Mapping[str, Trainable] = {
            "flow": Trainable(network, optimizer, scheduler)
        }

    def count_units(self, batch: FlowBatch) -> dict[str, int]:
        return {"frames": int(batch.mel_lens_B.sum())}

    def losses(self, batch: FlowBatch) -> Iterator[Loss]:
        yield self._loss(batch)

    def validate(self, batch: FlowBatch) -> Loss:
        return self._loss(batch)

    def preview(self, batch: FlowBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        mel = self._sample(batch)
        for row, utt in enumerate(batch.utts):
            frames = int(batch.mel_lens_B[row])
            yield f"{utt}/real", SpectrogramImage(batch.mel_BFT[row, :, :frames].cpu().numpy())
            yield f"{utt}/generated", SpectrogramImage(mel[row, :, :frames].float().cpu().numpy())

    def _loss(self, batch: FlowBatch) -> Loss:
        noisy, velocity = probability_path(batch.mel_BFT, batch.noise_BFT, batch.time_B)
        estimate = self._velocity(batch, noisy, batch.time_B, self._prompt(batch), batch.keep_B)
        mask = valid_mask(batch.mel_lens_B, noisy.size(2)).unsqueeze(1)
        error = (estimate.to(velocity.dtype) - velocity).square() * mask
        return Loss(mse=(error.sum() / noisy.size(1), "frames", 1.0))

    def _velocity(
        self, batch: FlowBatch, noisy: Tensor, time_B: Tensor, prompt: Tensor, keep_B: Tensor
    ) -> Tensor:
        velocity: Tensor = self.trainables["flow"](
            batch.token_BN,
            batch.token_lens_B,
            batch.speaker_BE,
            noisy,
            batch.mel_lens_B,
            time_B,
            prompt,
            keep_B,
            batch.streaming_B,
        )
        return velocity

    def _prompt(self, batch: FlowBatch) -> Tensor:
        return batch.mel_BFT * valid_mask(batch.prompt_lens_B, batch.mel_BFT.size(2)).unsqueeze(1)

    def _sample(self, batch: FlowBatch) -> Tensor:
        """The mel that the network makes of the batch's noise, without a prompt."""
        nothing = torch.zeros_like(batch.noise_BFT)
        keep, drop = torch.ones_like(batch.keep_B), torch.zeros_like(batch.keep_B)

        def velocity(y: Tensor, t: Tensor) -> Tensor:
            conditional = self._velocity(batch, y, t, nothing, keep)
            return guided(conditional, self._velocity(batch, y, t, nothing, drop), self.guidance)

        return euler(velocity, batch.noise_BFT)
