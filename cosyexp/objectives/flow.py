"""Training of a flow-matching model, which generates mel spectrograms from speech tokens.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.data.collators.flow import FlowBatch
from cosyexp.models.flow.matching import probability_path, sample
from cosyexp.models.layers.encoder import valid_mask
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable
from cosyexp.registry import register


@register("objective")
class FlowMatchingLoss:
    """Squared error of the estimated velocity (Lipman et al. 2023, "Flow Matching", eq. 23).

    All mel frames are equally weighted; the error is a mean over the mel bands of a frame.

    Args:
        network: the flow network.
        optimizer: makes the optimizer, see `Trainable`.
        scheduler: the learning-rate schedule, see `Trainable`.
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
        """Counts the mel frames of all rows."""
        return {"frames": int(batch.mel_lens_B.sum())}

    def losses(self, batch: FlowBatch) -> Iterator[Loss]:
        """Yields the loss of the flow network."""
        yield self._loss(batch)

    def validate(self, batch: FlowBatch) -> Loss:
        """Returns the loss, as in training."""
        return self._loss(batch)

    def preview(self, batch: FlowBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        """Yields the real and the generated mel spectrogram of each utterance."""
        mel_BFT = self._sample(batch)
        for row, utt in enumerate(batch.utts):
            frames = int(batch.mel_lens_B[row])
            real_FT, generated_FT = batch.mel_BFT[row, :, :frames], mel_BFT[row, :, :frames]
            yield f"{utt}/real", SpectrogramImage(real_FT.cpu().numpy())
            yield f"{utt}/generated", SpectrogramImage(generated_FT.float().cpu().numpy())

    def _loss(self, batch: FlowBatch) -> Loss:
        noisy_BFT, velocity_BFT = probability_path(batch.mel_BFT, batch.noise_BFT, batch.time_B)
        estimate_BFT = self._velocity(
            batch, noisy_BFT, batch.time_B, self._prompt(batch), batch.keep_B
        )
        mask_B1T = valid_mask(batch.mel_lens_B, noisy_BFT.size(2)).unsqueeze(1)
        error_BFT = (estimate_BFT.to(velocity_BFT.dtype) - velocity_BFT).square() * mask_B1T
        return Loss(mse=(error_BFT.sum() / noisy_BFT.size(1), "frames", 1.0))

    def _velocity(
        self,
        batch: FlowBatch,
        noisy_BFT: Tensor,
        time_B: Tensor,
        prompt_BFT: Tensor,
        keep_B: Tensor,
    ) -> Tensor:
        velocity_BFT: Tensor = self.trainables["flow"](
            batch.token_BN,
            batch.token_lens_B,
            batch.speaker_BE,
            noisy_BFT,
            batch.mel_lens_B,
            time_B,
            prompt_BFT,
            keep_B,
            batch.streaming_B,
        )
        return velocity_BFT

    def _prompt(self, batch: FlowBatch) -> Tensor:
        """Returns the mel spectrograms with all frames behind the prompt set to 0, (B, F, T)."""
        return batch.mel_BFT * valid_mask(batch.prompt_lens_B, batch.mel_BFT.size(2)).unsqueeze(1)

    def _sample(self, batch: FlowBatch) -> Tensor:
        """Generates mel spectrograms (B, F, T) from the batch's noise, without a prompt."""
        conditions = torch.zeros_like(batch.noise_BFT), torch.ones_like(batch.keep_B)
        velocity = partial(self._velocity, batch.twice())
        return sample(velocity, batch.noise_BFT, conditions, guidance=self.guidance)
