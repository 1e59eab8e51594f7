"""The flow models, which generate mel spectrograms from speech tokens and a speaker embedding.

The three families differ in how tokens become frames.

B batch, N speech tokens, D width, E speaker embedding, F mel bands, T mel frames.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cosyexp.arguments import Count
from cosyexp.models.flow.length_regulator import LengthRegulator
from cosyexp.models.flow.matching import FlowMatching
from cosyexp.models.flow.parts import LookAhead
from cosyexp.models.flow.upsampling import UpsamplingEncoder
from cosyexp.models.layers.encoder import Encoder, valid_mask
from cosyexp.registry import register


class FlowNetwork(nn.Module):
    """Base class of the flow models (Du et al. 2024, "CosyVoice", section 2.3).

    A subclass implements `to_mu` and adds its modules, among them `decoder`, in the order of the
    official checkpoints.

    Args:
        speech_vocabulary: Number of speech tokens.
        token_width: D, the width of the token embedding.
        speaker_dim: E, the width of the speaker embedding.
        mel_bins: F.
    """

    if TYPE_CHECKING:  # TorchScript evaluates annotations, and cannot compile this type
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
        """Estimates the velocity at a point between noise and mel.

        Args:
            token_BN: Speech tokens; padding may be any valid token.
            token_lens_B: Number of valid tokens of each row.
            speaker_BE: Speaker embeddings.
            noisy_BFT: Points on the path from noise to mel, see `probability_path`.
            mel_lens_B: Number of valid frames of each row.
            t_B: The time of each row, in [0, 1].
            prompt_BFT: The mel of each row's prompt, 0 after it.
            keep_B: 1 for rows that keep their conditions, 0 for rows that drop all of them
                (classifier-free guidance, Ho & Salimans 2022).
            streaming_B: Boolean, True for rows whose positions see no further than the end of their
                own chunk; None if no row is streaming.

        Returns:
            The velocity, (B, F, T); undefined on padding.
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
        """Encodes tokens and speaker to the conditions of the velocity.

        Args:
            token_BN: Speech tokens; padding may be any valid token.
            token_lens_B: Number of valid tokens of each row.
            speaker_BE: Speaker embeddings.
            frames: T.
            mel_lens_B: Number of valid frames of each row.
            streaming_B: See `forward`.
            prompt_lens: In synthesis, how many tokens and how many frames of each row belong to the
                prompt, (B,) each; None in training.

        Returns:
            mu (B, F, T), and the projected speaker embedding (B, F).
        """
        speaker = self.spk_embed_affine_layer(nn.functional.normalize(speaker_BE, dim=1))
        valid = valid_mask(token_lens_B, token_BN.size(1)).unsqueeze(-1)
        tokens = self.input_embedding(token_BN) * valid
        mu = self.to_mu(tokens, token_lens_B, frames, mel_lens_B, streaming_B, prompt_lens)
        return mu.transpose(1, 2), speaker

    def to_mu(
        self,
        token_BND: Tensor,
        token_lens_B: Tensor,
        frames: int,
        mel_lens_B: Tensor,
        streaming_B: Tensor | None,
        prompt_lens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Encodes embedded tokens to mu; every subclass implements this.

        Args:
            token_BND: Embedded tokens, 0 on padding.
            token_lens_B: See `encode`.
            frames: See `encode`.
            mel_lens_B: See `encode`.
            streaming_B: See `encode`.
            prompt_lens: See `encode`.

        Returns:
            mu, (B, T, F).

        Raises:
            NotImplementedError: The subclass does not implement this method.
        """
        raise NotImplementedError


@register("network")
class MaskedDiffWithXvec(FlowNetwork):
    """The v1 flow model (Du et al. 2024, "CosyVoice", section 2.3).

    A conformer encodes the tokens, and a length regulator interpolates them to any number of
    frames. There are no chunks, so streaming rows are treated like the others. Mirrors
    `MaskedDiffWithXvec` of the original CosyVoice.

    Args:
        speech_vocabulary: Number of speech tokens.
        speaker_dim: E, the width of the speaker embedding.
        mel_bins: F.
        encoder: Encodes the tokens; its input width is D.
        estimator: The velocity estimator.
        regulator_layers: Number of smoothing layers of the length regulator.
        edge_tokens: See `LengthRegulator`.
        edge_frames: See `LengthRegulator`.
        padding: "own" keeps the rows of a batch independent; "original" interpolates a row together
            with its padding, as the original does. The estimator has the same option.

    Raises:
        ValueError: `padding` is unknown.
    """

    def __init__(
        self,
        *,
        speech_vocabulary: int,
        speaker_dim: int,
        mel_bins: int,
        encoder: Encoder,
        estimator: nn.Module,
        regulator_layers: Count = 4,
        edge_tokens: Count = 0,
        edge_frames: Count = 0,
        padding: str = "own",
    ) -> None:
        super().__init__(speech_vocabulary, encoder.in_width, speaker_dim, mel_bins)
        if padding not in ("own", "original"):
            raise ValueError(f"padding={padding!r} must be 'own' or 'original'")
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
        """Encodes tokens and interpolates them to frames."""
        hidden = self.encoder_proj(self.encoder(token_BND, token_lens_B)).transpose(1, 2)
        tokens_BP, frames_BP = token_lens_B.unsqueeze(1), mel_lens_B.unsqueeze(1)
        if prompt_lens is not None:
            tokens_BP, frames_BP = self.length_regulator.parts(
                token_lens_B, mel_lens_B, prompt_lens[0], prompt_lens[1]
            )
        return self.length_regulator(hidden, tokens_BP, frames_BP, frames).transpose(1, 2)


@register("network")
class CausalMaskedDiffWithXvec(FlowNetwork):
    """The v2 flow model (Du et al. 2024, "CosyVoice 2", section 2.4).

    The encoder upsamples tokens by a fixed factor. Mirrors `CausalMaskedDiffWithXvec` of the
    original CosyVoice.

    Args:
        speech_vocabulary: Number of speech tokens.
        speaker_dim: E, the width of the speaker embedding.
        mel_bins: F.
        encoder: Encodes and upsamples the tokens; its width is D.
        estimator: The velocity estimator, a causal `UNet`.
    """

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
        self.frames_per_token, self.look_ahead = encoder.factor, encoder.look_ahead
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
        """Encodes and upsamples tokens; `prompt_lens` is not used."""
        hidden = self.encoder(token_BND, token_lens_B, frames, mel_lens_B, streaming_B)
        return self.encoder_proj(hidden)


@register("network")
class CausalMaskedDiffWithDiT(FlowNetwork):
    """The v3 flow model (Du et al. 2025, "CosyVoice 3", section 2.3).

    There is no encoder: tokens are embedded in F channels, get a look-ahead and are repeated.
    Mirrors `CausalMaskedDiffWithDiT` of the original CosyVoice.

    Args:
        speech_vocabulary: Number of speech tokens.
        speaker_dim: E, the width of the speaker embedding.
        mel_bins: F.
        frames_per_token: Mel frames per token.
        look_ahead: Number of tokens of look-ahead.
        hidden: Hidden channels of the look-ahead.
        estimator: The velocity estimator, a `DiT`.
    """

    def __init__(
        self,
        *,
        speech_vocabulary: int,
        speaker_dim: int,
        mel_bins: int,
        frames_per_token: int,
        look_ahead: Count,
        hidden: int,
        estimator: nn.Module,
    ) -> None:
        super().__init__(speech_vocabulary, mel_bins, speaker_dim, mel_bins)
        self.frames_per_token, self.look_ahead = frames_per_token, look_ahead
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
        """Applies the look-ahead and repeats each token; lengths and chunks are not used."""
        hidden = self.pre_lookahead_layer(token_BND)[:, : frames // self.frames_per_token]
        return hidden.repeat_interleave(self.frames_per_token, dim=1)
