"""The flow model of the v1 family: speech tokens and a speaker to a mel spectrogram.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames.
"""

from torch import Tensor, nn

from cosyexp.models.flow.length_regulator import LengthRegulator
from cosyexp.models.flow.matching import FlowMatching
from cosyexp.models.layers.encoder import Encoder, valid_mask


class MaskedDiffWithXvec(nn.Module):
    """Conformer, length regulator, and a U-Net that estimates the velocity (Du et al. 2024, "CosyVoice", section 2.3).

    speech_vocabulary: number of token ids. speaker_dim: width of the speaker embedding. mel_bins: F.
    encoder: takes its own width as input. estimator: the velocity field.
    regulator_layers: convolutions behind the stretching.
    padding: "own" keeps the rows of a batch apart; "original" lets padding into the length regulator, as the original does
        (the estimator has the same choice).
    """

    def __init__(
        self,
        *,
        speech_vocabulary: int,
        speaker_dim: int,
        mel_bins: int,
        encoder: Encoder,
        estimator: nn.Module,
        regulator_layers: int = 4,
        padding: str = "own",
    ) -> None:
        super().__init__()
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} is neither 'own' nor 'original'")
        self.input_embedding = nn.Embedding(speech_vocabulary, encoder.width)
        self.spk_embed_affine_layer = nn.Linear(speaker_dim, mel_bins)
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.width, mel_bins)
        self.decoder = FlowMatching(estimator)
        self.length_regulator = LengthRegulator(channels=mel_bins, layers=regulator_layers, padding=padding)

    def forward(
        self,
        token_BN: Tensor,
        token_lens_B: Tensor,
        speaker_BE: Tensor,
        noisy_BFT: Tensor,
        mel_lens_B: Tensor,
        t_B: Tensor,
        prompt_BFT: Tensor,
        keep_B: Tensor,
    ) -> Tensor:
        """The velocity (B, F, T) at the noisy mel, 0 on padding.

        keep: 1 where a row keeps its conditions, 0 where it drops them all (classifier-free guidance).
        """
        mu, speaker = self.encode(token_BN, token_lens_B, speaker_BE, noisy_BFT.size(2), mel_lens_B)
        keep = keep_B.to(mu.dtype)[:, None, None]
        mask = valid_mask(mel_lens_B, noisy_BFT.size(2)).unsqueeze(1).to(mu.dtype)
        return self.decoder(noisy_BFT, mask, mu * keep, t_B, speaker * keep[:, 0], prompt_BFT * keep)

    def encode(self, token_BN: Tensor, token_lens_B: Tensor, speaker_BE: Tensor, frames: int, mel_lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """The conditions of the velocity field: mu (B, F, frames) and the speaker (B, F)."""
        speaker = self.spk_embed_affine_layer(nn.functional.normalize(speaker_BE, dim=1))
        tokens = self.input_embedding(token_BN) * valid_mask(token_lens_B, token_BN.size(1)).unsqueeze(-1)
        hidden = self.encoder_proj(self.encoder(tokens, token_lens_B)).transpose(1, 2)
        return self.length_regulator(hidden, token_lens_B, frames, mel_lens_B), speaker
