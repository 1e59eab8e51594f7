"""The flow models: speech tokens and a speaker to a mel spectrogram. The three families differ in how tokens become frames.

B batch, N speech tokens, D width, E speaker embedding, F mel bands, T mel frames.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cosyexp.models.flow.length_regulator import LengthRegulator
from cosyexp.models.flow.matching import FlowMatching
from cosyexp.models.flow.parts import LookAhead
from cosyexp.models.flow.upsampling import UpsamplingEncoder
from cosyexp.models.layers.encoder import Encoder, valid_mask


class FlowNetwork(nn.Module):
    """What the families share. A subclass adds its modules in the order of the official checkpoints, `decoder` among them.

    speech_vocabulary: number of token ids. token_width: D. speaker_dim: width of the speaker embedding. mel_bins: F.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations, and knows no such type
        decoder: FlowMatching

    def __init__(
        self, speech_vocabulary: int, token_width: int, speaker_dim: int, mel_bins: int
    ) -> None:
        super().__init__()
        self.input_embedding = nn.Embedding(speech_vocabulary, token_width)
        self.spk_embed_affine_layer = nn.Linear(speaker_dim, mel_bins)

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
        streaming_B: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, F, T) at the noisy mel; behind a row's frames it has no meaning.

        keep: 1 where a row keeps its conditions, 0 where it drops them all (classifier-free guidance).
        streaming: bool, True where a row sees the future by chunks alone.
        """
        mu, speaker = self.encode(
            token_BN, token_lens_B, speaker_BE, noisy_BFT.size(2), mel_lens_B, streaming_B
        )
        keep = keep_B.to(mu.dtype)[:, None, None]
        mask = valid_mask(mel_lens_B, noisy_BFT.size(2)).unsqueeze(1).to(mu.dtype)
        return self.decoder(
            noisy_BFT, mask, mu * keep, t_B, speaker * keep[:, 0], prompt_BFT * keep, streaming_B
        )

    def encode(
        self,
        token_BN: Tensor,
        token_lens_B: Tensor,
        speaker_BE: Tensor,
        frames: int,
        mel_lens_B: Tensor,
        streaming_B: Tensor | None = None,
        prompt_lens: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The conditions of the velocity field: mu (B, F, frames) and the speaker (B, F).

        prompt_lens: in synthesis, how many of the tokens and of the frames are the prompt's, (B,) each.
        """
        speaker = self.spk_embed_affine_layer(nn.functional.normalize(speaker_BE, dim=1))
        tokens = self.input_embedding(token_BN) * valid_mask(
            token_lens_B, token_BN.size(1)
        ).unsqueeze(-1)
        return self.to_mu(
            tokens, token_lens_B, frames, mel_lens_B, streaming_B, prompt_lens
        ).transpose(1, 2), speaker

    def to_mu(
        self,
        token_BND: Tensor,
        token_lens_B: Tensor,
        frames: int,
        mel_lens_B: Tensor,
        streaming_B: Tensor | None,
        prompt_lens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Embedded tokens, 0 on padding, to (B, frames, F)."""
        raise NotImplementedError


class MaskedDiffWithXvec(FlowNetwork):
    """v1: a conformer, and a length regulator for any ratio of frames to tokens (Du et al. 2024, "CosyVoice", section 2.3).

    estimator: the velocity field. regulator_layers: convolutions behind the stretching.
    edge_tokens, edge_frames: see LengthRegulator. It has no chunks: streaming rows are as all others.
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
        edge_tokens: int = 0,
        edge_frames: int = 0,
        padding: str = "own",
    ) -> None:
        super().__init__(speech_vocabulary, encoder.in_width, speaker_dim, mel_bins)
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} is neither 'own' nor 'original'")
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.width, mel_bins)
        self.decoder = FlowMatching(estimator)
        self.length_regulator = LengthRegulator(
            channels=mel_bins,
            layers=regulator_layers,
            edge_tokens=edge_tokens,
            edge_frames=edge_frames,
            padding=padding,
        )

    def to_mu(
        self,
        token_BND: Tensor,
        token_lens_B: Tensor,
        frames: int,
        mel_lens_B: Tensor,
        streaming_B: Tensor | None,
        prompt_lens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        hidden = self.encoder_proj(self.encoder(token_BND, token_lens_B)).transpose(1, 2)
        tokens_BP, frames_BP = token_lens_B.unsqueeze(1), mel_lens_B.unsqueeze(1)
        if prompt_lens is not None:
            tokens_BP, frames_BP = self.length_regulator.parts(
                token_lens_B, mel_lens_B, prompt_lens[0], prompt_lens[1]
            )
        return self.length_regulator(hidden, tokens_BP, frames_BP, frames).transpose(1, 2)


class CausalMaskedDiffWithXvec(FlowNetwork):
    """v2: an encoder that upsamples by a fixed factor (Du et al. 2024, "CosyVoice 2", section 2.4)."""

    def __init__(
        self,
        *,
        speech_vocabulary: int,
        speaker_dim: int,
        mel_bins: int,
        encoder: UpsamplingEncoder,
        estimator: nn.Module,
    ) -> None:
        super().__init__(speech_vocabulary, encoder.width, speaker_dim, mel_bins)
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.width, mel_bins)
        self.decoder = FlowMatching(estimator)

    def to_mu(
        self,
        token_BND: Tensor,
        token_lens_B: Tensor,
        frames: int,
        mel_lens_B: Tensor,
        streaming_B: Tensor | None,
        prompt_lens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        return self.encoder_proj(
            self.encoder(token_BND, token_lens_B, frames, mel_lens_B, streaming_B)
        )


class CausalMaskedDiffWithDiT(FlowNetwork):
    """v3: no encoder, only a look-ahead (Du et al. 2025, "CosyVoice 3", section 2.3).

    frames_per_token: mel frames of a token. look_ahead: tokens that are looked at ahead, through so many `hidden` channels.
    """

    def __init__(
        self,
        *,
        speech_vocabulary: int,
        speaker_dim: int,
        mel_bins: int,
        frames_per_token: int,
        look_ahead: int,
        hidden: int,
        estimator: nn.Module,
    ) -> None:
        super().__init__(speech_vocabulary, mel_bins, speaker_dim, mel_bins)
        self.frames_per_token = frames_per_token
        self.pre_lookahead_layer = LookAhead(mel_bins, hidden, look_ahead)
        self.decoder = FlowMatching(estimator)

    def to_mu(
        self,
        token_BND: Tensor,
        token_lens_B: Tensor,
        frames: int,
        mel_lens_B: Tensor,
        streaming_B: Tensor | None,
        prompt_lens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        hidden = self.pre_lookahead_layer(token_BND)[:, : frames // self.frames_per_token]
        return hidden.repeat_interleave(self.frames_per_token, dim=1)
