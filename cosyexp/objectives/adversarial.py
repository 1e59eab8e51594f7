"""Adversarial training of a vocoder, which generates waveforms from mel spectrograms.

B batch, F mel bands, T mel frames, S samples, H harmonics of the source.
"""

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
from cosyexp.registry import register


@register("objective")
class Adversarial:
    """Least-squares GAN with feature matching, mel, F0 and TPR losses (Li et al. 2023, "HiFTNet").

    It extends the losses of Kong et al. (2020, "HiFi-GAN"). The trainables are the discriminator,
    which is updated first, and the generator.

    Args:
        network: the generator, which predicts a waveform and its F0.
        discriminator: all discriminators, as one network that returns the list of their maps.
        mel: the spectrogram of the mel loss, over all frequencies.
        sample_rate: of the waveforms, in Hz.
        optimizer: makes the optimizer of the generator, see `Trainable`.
        scheduler: the learning-rate schedule of the generator, see `Trainable`.
        discriminator_optimizer: makes the optimizer of the discriminator.
        discriminator_scheduler: the learning-rate schedule of the discriminator.
        mel_weight: weight of the distance of the mel spectrograms.
        feature_weight: weight of the feature matching loss.
        tpr_weight: weight of the TPR loss of both networks.
        f0_weight: weight of the distance of F0.
        tau: upper bound of the TPR loss, see `tpr_loss`.
        tpr_over: "row" or "batch", see `tpr_loss`.
        accumulate: micro-batches of a rank in a step. With one, a single forward pass of the
            generator serves both losses. With several it is run again for the second loss, which
            gives the same numbers but keeps only one graph in memory.
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
        self.mel, self.sample_rate, self.tau, self.tpr_over = mel, sample_rate, tau, tpr_over
        self.reuse_forward = accumulate == 1
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
        """Counts the segments, one in each row."""
        return {"segments": len(batch)}

    def losses(self, batch: VocoderBatch) -> Iterator[Loss]:
        """Yields the loss of the discriminator, then that of the generator."""
        with torch.set_grad_enabled(self.reuse_forward):
            fake, f0 = self._generate(batch)
        yield self._discriminator_loss(batch.wave_BS, fake.detach())
        if not self.reuse_forward:
            fake, f0 = self._generate(batch)
        with frozen(self.discriminator):
            loss = self._generator_loss(batch, fake, f0)
        yield loss

    def validate(self, batch: VocoderBatch) -> Loss:
        """Returns only the mel and F0 losses.

        The adversarial terms depend on both networks: they rise as the other network learns, so
        they do not tell which of two checkpoints is better.
        """
        fake, f0 = self._generate(batch)
        return Loss(**self._distances(batch, fake, f0))

    def preview(self, batch: VocoderBatch) -> Iterator[tuple[str, SpectrogramImage | Audio]]:
        """Yields the real and the generated segment of each utterance, as audio and spectrogram."""
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
        outputs = self.discriminator(torch.cat([real, fake.to(real.dtype)]))
        real_maps = [[x[: len(real)] for x in maps] for maps in outputs]
        fake_maps = [[x[len(real) :] for x in maps] for maps in outputs]
        tpr = tpr_loss(real_maps, fake_maps, self.tau, self.tpr_over)
        return Loss(
            d_adversarial=(discriminator_loss(real_maps, fake_maps).sum(), "segments", 1.0),
            d_tpr=(tpr.sum(), "segments", self.tpr_weight),
        )

    def _generator_loss(self, batch: VocoderBatch, fake: Tensor, f0: Tensor) -> Loss:
        fake_maps = self.discriminator(fake)
        with torch.no_grad():
            real_maps = self.discriminator(batch.wave_BS)
        tpr = tpr_loss(fake_maps, real_maps, self.tau, self.tpr_over)
        return Loss(
            adversarial=(generator_loss(fake_maps).sum(), "segments", 1.0),
            feature=(feature_loss(real_maps, fake_maps).sum(), "segments", self.feature_weight),
            tpr=(tpr.sum(), "segments", self.tpr_weight),
            **self._distances(batch, fake, f0),
        )

    def _distances(
        self, batch: VocoderBatch, fake: Tensor, f0: Tensor
    ) -> dict[str, tuple[Tensor, str, float]]:
        """Returns the mean absolute errors of the mel spectrograms and of F0, as loss terms."""
        mel = per_row_mean((self.mel(fake) - self.mel(batch.wave_BS)).abs())
        return {
            "mel": (mel.sum(), "segments", self.mel_weight),
            "f0": (per_row_mean((f0 - batch.f0_BT).abs()).sum(), "segments", self.f0_weight),
        }
