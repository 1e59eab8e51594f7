"""The speech-token language model of the v1 family: text encoder, then a causal transformer over text and speech tokens.

B batch, L text tokens, N speech tokens, E speaker embedding, T positions, A answers, D width of the LM, V speech classes
(vocabulary + end of speech). One row of its input is [start, speaker, text_1..L, task, speech_1..N]; position `task` predicts speech_1,
position speech_N the end of speech.
"""

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import Encoder
from cosyexp.models.llm.sequence import take


class TransformerLM(nn.Module):
    """Text and speaker in, log-odds of the next speech token out (Du et al. 2024, "CosyVoice", section 2.2).

    text_vocabulary, speech_vocabulary: numbers of token ids; the end of speech is class `speech_vocabulary`.
    text_width: width of the text embedding, the input width of `text_encoder`.
    speaker_dim: width of the speaker embedding.
    text_encoder, llm: both causal; `llm` takes its own width as input.
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
        """Teacher forcing; padded ids may be anything inside the vocabulary.

        order: which of [text_1..L, speech_1..N, start, task, speaker] stands at each position; lens: positions of a row.
        Returns (B, A, V), the log-odds at the positions `answer`.
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
        """The embedded prompt [start, speaker, text_1..L, task] of texts without padding, (B, L + 3, D); the speaker may be missing."""
        lengths = torch.full((text_BL.size(0),), text_BL.size(1), device=text_BL.device)
        start, task = self._sos_task_embedding(text_BL.size(0)).split(1, dim=1)
        speaker = start[:, :0] if speaker_BE is None else self._speaker(speaker_BE)
        return torch.cat([start, speaker, self._text(text_BL, lengths), task], dim=1)

    def empty_cache(self, x: Tensor) -> Tensor:
        return self.llm.empty_cache(x)

    def decode(self, x_BTD: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Continues a cached sequence; returns the log-probabilities (B, V) after its last position, and the cache."""
        hidden, cache = self.llm.extend(x_BTD, cache)
        return torch.log_softmax(self.llm_decoder(hidden[:, -1]).float(), dim=-1), cache

    def _text(self, text_BL: Tensor, lengths_B: Tensor) -> Tensor:
        return self.text_encoder_affine_layer(
            self.text_encoder(self.text_embedding(text_BL), lengths_B)
        )

    def _speaker(self, speaker_BE: Tensor) -> Tensor:
        return self.spk_embed_affine_layer(nn.functional.normalize(speaker_BE, dim=1)).unsqueeze(1)

    def _sos_task_embedding(self, batch: int) -> Tensor:
        return self.llm_embedding.weight.unsqueeze(0).expand(batch, -1, -1)
