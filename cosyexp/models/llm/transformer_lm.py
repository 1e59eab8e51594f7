"""The speech-token language model of the v1 family: text encoder, then a causal transformer over text and speech tokens.

B batch, L text tokens, N speech tokens, E speaker embedding, D width of the LM, V speech classes (vocabulary + end of speech).
One row of its input is [start, speaker, text_1..L, task, speech_1..N]; position `task` predicts speech_1, position speech_N
the end of speech.
"""

import torch
from torch import Tensor, nn

from cosyexp.models.layers.encoder import Encoder


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
        self.end_of_speech = speech_vocabulary
        self.text_embedding = nn.Embedding(text_vocabulary, text_width)
        self.text_encoder = text_encoder
        self.text_encoder_affine_layer = nn.Linear(text_encoder.width, llm.width)
        self.llm_embedding = nn.Embedding(2, llm.width)
        self.llm = llm
        self.llm_decoder = nn.Linear(llm.width, speech_vocabulary + 1)
        self.speech_embedding = nn.Embedding(speech_vocabulary, llm.width)
        self.spk_embed_affine_layer = nn.Linear(speaker_dim, llm.width)

    def forward(self, text_BL: Tensor, text_lens_B: Tensor, speech_BN: Tensor, speech_lens_B: Tensor, speaker_BE: Tensor) -> Tensor:
        """Teacher forcing. Padded ids may be anything inside the vocabulary.

        Returns (B, N + 1, V): row b holds at i < speech_lens[b] the log-odds of speech token i, at speech_lens[b] those of
        the end of speech, and nothing meaningful behind it.
        """
        prefix = self.prefix(text_BL, text_lens_B, speaker_BE)
        x = torch.cat([prefix, self.speech_embedding(speech_BN)], dim=1)
        # text and speech are padded each for itself: close the gap between them, row by row
        texts, size = text_BL.size(1), x.size(1)
        place = torch.arange(size, device=x.device).expand(x.size(0), -1)
        gap = (texts - text_lens_B).unsqueeze(1)
        source = (place + gap * (place >= 2 + text_lens_B.unsqueeze(1))).clamp(max=size - 1)
        x = x.gather(1, source.unsqueeze(2).expand(-1, -1, x.size(2)))
        hidden = self.llm(x, text_lens_B + speech_lens_B + 3)
        # only the answer's positions go through the head
        answer = torch.arange(speech_BN.size(1) + 1, device=x.device) + 2 + text_lens_B.unsqueeze(1)
        answer = answer.clamp(max=size - 1)
        return self.llm_decoder(hidden.gather(1, answer.unsqueeze(2).expand(-1, -1, hidden.size(2))))

    def prefix(self, text_BL: Tensor, text_lens_B: Tensor, speaker_BE: Tensor) -> Tensor:
        """The embedded prompt [start, speaker, text_1..L, task] of padded texts, (B, L + 3, D)."""
        text = self.text_encoder_affine_layer(self.text_encoder(self.text_embedding(text_BL), text_lens_B))
        speaker = self.spk_embed_affine_layer(nn.functional.normalize(speaker_BE, dim=1)).unsqueeze(1)
        start, task = self.llm_embedding.weight.to(text.dtype).unsqueeze(0).expand(text.size(0), -1, -1).split(1, dim=1)
        return torch.cat([start, speaker.to(text.dtype), text, task], dim=1)

    def decode(self, x_BTD: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Continues a cached sequence; returns the log-probabilities (B, V) after its last position, and the cache."""
        hidden, cache = self.llm.extend(x_BTD, cache)
        return torch.log_softmax(self.llm_decoder(hidden[:, -1]).float(), dim=-1), cache
