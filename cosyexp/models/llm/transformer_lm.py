"""The speech-token language model of the v1 family: a text encoder and a causal transformer.

The transformer reads [sos, speaker, text_1..L, task, speech_1..N]. The position of task predicts
speech_1, that of speech_N predicts eos.

B batch, L text tokens, N speech tokens, E speaker embedding, T positions, A labels,
D width of the transformer, V speech classes (speech tokens and eos).
"""

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import Encoder
from cosyexp.models.llm.sequence import prompt_index, seen_keys, take
from cosyexp.registry import register


@register("network")
class TransformerLM(nn.Module):
    """Predicts speech tokens from text and speaker (Du et al. 2024, "CosyVoice", section 2.2).

    Mirrors `TransformerLM` of the original CosyVoice.

    Args:
        text_vocabulary: Number of text tokens.
        speech_vocabulary: Number of speech tokens; eos is the class after them.
        text_width: Width of the text embedding, the input width of `text_encoder`.
        speaker_dim: E, the width of the speaker embedding.
        text_encoder: Encodes the text.
        llm: The transformer, whose input width is its own width; it must be causal.
    """

    def __init__(
        self,
        *,
        text_vocabulary: int,
        speech_vocabulary: int,
        text_width: int,
        speaker_dim: int,
        text_encoder: Encoder,
        llm: Encoder,
    ) -> None:
        super().__init__()
        self.text_embedding = nn.Embedding(text_vocabulary, text_width)
        self.text_encoder = text_encoder
        self.text_encoder_affine_layer = nn.Linear(text_encoder.width, llm.width)
        self.llm_embedding = nn.Embedding(2, llm.width)
        self.llm = llm
        self.llm_decoder = nn.Linear(llm.width, speech_vocabulary + 1)
        self.speech_embedding = nn.Embedding(speech_vocabulary, llm.width)
        self.spk_embed_affine_layer = nn.Linear(speaker_dim, llm.width)

    def forward(
        self,
        text_BL: Tensor,
        text_lens_B: Tensor,
        speech_BN: Tensor,
        speaker_BE: Tensor,
        gather_index_BT: Tensor,
        lens_B: Tensor,
        label_positions_BA: Tensor,
    ) -> Tensor:
        """Predicts speech tokens by teacher forcing.

        Args:
            text_BL: Text tokens; padding may be any valid token.
            text_lens_B: Number of text tokens of each row.
            speech_BN: Speech tokens; padding may be any valid token.
            speaker_BE: Speaker embeddings.
            gather_index_BT: The index in [text_1..L, speech_1..N, sos, task, speaker] of the
                embedding at each position.
            lens_B: Number of valid positions of each row.
            label_positions_BA: Positions whose next token is a label.

        Returns:
            Logits at the label positions, (B, A, V).
        """
        parts = [
            self._text(text_BL, text_lens_B),
            self.speech_embedding(speech_BN),
            self._sos_task_embedding(len(text_BL)),
            self._speaker(speaker_BE),
        ]
        hidden = self.llm(take(torch.cat(parts, dim=1), gather_index_BT), lens_B)
        return self.llm_decoder(take(hidden, label_positions_BA))

    def prompt(self, text_BL: Tensor, speaker_BE: Tensor | None) -> Tensor:
        """Embeds the prompt [sos, speaker, text_1..L, task].

        Args:
            text_BL: Text tokens, without padding.
            speaker_BE: Speaker embeddings; None leaves the speaker out.

        Returns:
            The embedded prompt, (B, L + 3, D), or (B, L + 2, D) without a speaker.
        """
        lengths = torch.full((text_BL.size(0),), text_BL.size(1), device=text_BL.device)
        start, task = self._sos_task_embedding(text_BL.size(0)).split(1, dim=1)
        speaker = start[:, :0] if speaker_BE is None else self._speaker(speaker_BE)
        return torch.cat([start, speaker, self._text(text_BL, lengths), task], dim=1)

    def aligned_prompts(
        self,
        text_BL: Tensor,
        text_lens_B: Tensor,
        speech_BN: Tensor,
        speech_lens_B: Tensor,
        speaker_BE: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Embeds the prompts [sos, speaker, text, task, speech], aligned at their ends.

        Args:
            text_BL: Text tokens; padding may be any valid token.
            text_lens_B: Number of text tokens of each row.
            speech_BN: Speech tokens to continue; padding may be any valid token. N is at least 1.
            speech_lens_B: Number of speech tokens of each row.
            speaker_BE: Speaker embeddings.

        Returns:
            The embedded prompts, (B, L + N + 3, D), and the number of positions before the start of
            each row, (B,).
        """
        parts = [
            self._text(text_BL, text_lens_B),
            self.speech_embedding(speech_BN),
            self._sos_task_embedding(text_BL.size(0)),
            self._speaker(speaker_BE),
        ]
        index_BT, start_B = prompt_index(
            text_lens_B, speech_lens_B, text_BL.size(1), speech_BN.size(1), True
        )
        return take(torch.cat(parts, dim=1), index_BT), start_B

    def empty_cache(self, x: Tensor) -> Tensor:
        """Returns an empty cache with the batch size and dtype of `x`; see `Encoder`."""
        return self.llm.empty_cache(x)

    def decode(
        self, x_BTD: Tensor, cache: Tensor, start_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Appends embeddings to cached sequences and predicts the next token.

        Args:
            x_BTD: The embeddings.
            cache: The cache of everything before; see `Encoder`.
            start_B: Number of positions before the start of each row; None if all start at 0.

        Returns:
            Log-probabilities after the last position (B, V), and the cache extended by T positions.
        """
        seen: Tensor | None = None
        if start_B is not None:
            seen = seen_keys(start_B, x_BTD.size(1), cache.size(3) + x_BTD.size(1))
        hidden, cache = self.llm.extend(x_BTD, cache, seen)
        return torch.log_softmax(self.llm_decoder(hidden[:, -1]).float(), dim=-1), cache

    def _text(self, text_BL: Tensor, lengths_B: Tensor) -> Tensor:
        encoded = self.text_encoder(self.text_embedding(text_BL), lengths_B)
        return self.text_encoder_affine_layer(encoded)

    def _speaker(self, speaker_BE: Tensor) -> Tensor:
        return self.spk_embed_affine_layer(nn.functional.normalize(speaker_BE, dim=1)).unsqueeze(1)

    def _sos_task_embedding(self, batch: int) -> Tensor:
        return self.llm_embedding.weight.unsqueeze(0).expand(batch, -1, -1)
