"""A vocoder trained against its discriminators."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.data.collators.hifigan import VocoderBatch
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.objectives.base import Audio, Loss, SpectrogramImage, Trainable, frozen
from cosyexp.objectives.losses.adversarial import (
    discriminator_loss,
    feature_loss,
    generator_loss,
    per_row_mean,
    tpr_loss,
)


class Adversarial:
    """Least-squares GAN with feature matching, mel and F0 losses, and TPR (Kong et al. 2020; Li et al. 2023, HiFTNet).

    mel: spectrogram of the mel loss, over all frequencies. Weights: see the losses. tau, tpr_over: of the TPR loss.
    accumulate: with one micro-batch a step, one forward of the generator serves both turns; with several it is done again in
        the second turn, which gives the same numbers and keeps only one graph alive.
    """

    units = ("segments",)

    def __init__(
        self,
        network: nn.Module,
        *,
        discriminator: nn.Module,
        mel: MelSpectrogram,
        sample_rate: int,
        optimizer: Any,
        scheduler: Any,
        discriminator_optimizer: Any,
        discriminator_scheduler: Any,
        mel_weight: float = 45.0,
        feature_weight: float = 2.0,
        tpr_weight: float = 1.0,
        f0_weight: float = 1.0,
        tau: float = 0.04,
        tpr_over: str = "row",
        accumulate: int = 1,
    ) -> None:
        self.frozen_modules = [mel]
        self.mel, self.sample_rate, self.tau, self.tpr_over, self.reuse_forward = (
            mel,
            sample_rate,
            tau,
            tpr_over,
            accumulate == 1,
        )
        self.mel_weight, self.feature_weight = mel_weight, feature_weight
        self.tpr_weight, self.f0_weight = tpr_weight, f0_weight
        self.generator = Trainable(network, optimizer, scheduler)
        self.discriminator = Trainable(
            discriminator, discriminator_optimizer, discriminator_scheduler
        )
        self.trainables: Mapping[str, Trainable] = {
            "discriminator": self.discriminator,
            "hifigan": self.generator,
        }

    def count_units(self, batch: VocoderBatch) -> dict[str, int]:
        return {"segments": len(batch)}

    def losses(self, batch: VocoderBatch) -> Iterator[Loss]:
        with torch.set_grad_enabled(self.reuse_forward):
            fake, f0 = self._generate(batch)
        yield self._discriminator_loss(batch.wave_BS, fake.detach())
        if not self.reuse_forward:
            fake, f0 = self._generate(batch)
        with frozen(self.discriminator):
            loss = self._generator_loss(batch, fake, f0)
        yield loss

    def validate(self, batch: VocoderBatch) -> Loss:
        """Mel and F0 alone: the adversarial terms measure two networks against each other, and rise as one of them learns."""
        fake, f0 = self._generate(batch)
        return Loss(**self._distances(batch, fake, f0))

    def preview(self, batch: VocoderBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        fake, _ = self._generate(batch)
        for utt, real, generated in zip(batch.utts, batch.wave_BS, fake.float(), strict=True):
            for kind, wave in (("real", real), ("generated", generated)):
                yield f"{utt}/{kind}", Audio(wave.cpu().numpy(), self.sample_rate)
                yield (
                    f"{utt}/{kind}",
                    SpectrogramImage(self.mel(wave.unsqueeze(0))[0].cpu().numpy()),
                )

    def _generate(self, batch: VocoderBatch) -> tuple[Tensor, Tensor]:
        fake, f0 = self.generator(batch.mel_BFT, batch.phase_BH, batch.noise_BHS)
        return fake, f0

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Loss:
        maps = self.discriminator(torch.cat([real, fake.to(real.dtype)]))
        judged_real = [[x[: len(real)] for x in judge] for judge in maps]
        judged_fake = [[x[len(real) :] for x in judge] for judge in maps]
        tpr = tpr_loss(judged_real, judged_fake, self.tau, self.tpr_over)
        return Loss(
            d_adversarial=(discriminator_loss(judged_real, judged_fake).sum(), "segments", 1.0),
            d_tpr=(tpr.sum(), "segments", self.tpr_weight),
        )

    def _generator_loss(self, batch: VocoderBatch, fake: Tensor, f0: Tensor) -> Loss:
        judged_fake = self.discriminator(fake)
        with torch.no_grad():
            judged_real = self.discriminator(batch.wave_BS)
        tpr = tpr_loss(judged_fake, judged_real, self.tau, self.tpr_over)
        return Loss(
            adversarial=(generator_loss(judged_fake).sum(), "segments", 1.0),
            feature=(feature_loss(judged_real, judged_fake).sum(), "segments", self.feature_weight),
            tpr=(tpr.sum(), "segments", self.tpr_weight),
            **self._distances(batch, fake, f0),
        )

    def _distances(
        self, batch: VocoderBatch, fake: Tensor, f0: Tensor
    ) -> dict[str, tuple[Tensor, str, float]]:
        mel = per_row_mean((self.mel(fake) - self.mel(batch.wave_BS)).abs())
        return {
            "mel": (mel.sum(), "segments", self.mel_weight),
            "f0": (per_row_mean((f0 - batch.f0_BT).abs()).sum(), "segments", self.f0_weight),
        }
