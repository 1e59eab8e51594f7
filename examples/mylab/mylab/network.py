"""A speech-token language model on a GRU, and the component that is exported.

B batch, L text tokens, N speech tokens, T positions, A labels, E speaker embedding, D width,
V speech classes.
"""

import torch
from torch import Tensor, nn


class GRULM(nn.Module):
    """Predicts speech tokens from the text and the speech tokens before them.

    Args:
        text_vocabulary: number of text tokens.
        speech_vocabulary: number of speech tokens; one more class ends the speech.
        speaker_dim: E.
        width: D.
    """

    def __init__(
        self, *, text_vocabulary: int, speech_vocabulary: int, speaker_dim: int, width: int
    ) -> None:
        super().__init__()
        self.text_embedding = nn.Embedding(text_vocabulary, width)
        self.speech_embedding = nn.Embedding(speech_vocabulary, width)
        self.sos_task_embedding = nn.Embedding(2, width)
        self.speaker = nn.Linear(speaker_dim, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, speech_vocabulary + 1)

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
        """Returns the logits (B, A, V) at the label positions.

        The batch says which of [text, speech, sos, task, speaker] stands at each position, see
        `cosyexp/data/layout.py`. A GRU is causal, so padding on the right changes nothing.
        """
        marks = self.sos_task_embedding.weight.expand(len(text_BL), -1, -1)
        speaker = self.speaker(speaker_BE).unsqueeze(1)
        parts = [self.text_embedding(text_BL), self.speech_embedding(speech_BN), marks, speaker]
        hidden = self.rnn(_gather(torch.cat(parts, dim=1), gather_index_BT))[0]
        return self.head(_gather(hidden, label_positions_BA))


def _gather(x_BTD: Tensor, index_BS: Tensor) -> Tensor:
    return x_BTD.gather(1, index_BS.unsqueeze(2).expand(-1, -1, x_BTD.size(2)))


class NextToken(nn.Module):
    """Text and earlier speech tokens to the logits of the next speech token."""

    inputs = ("text", "speech")
    outputs = ("logits",)
    dynamic = {
        "text": {0: "batch", 1: "text_len"},
        "speech": {0: "batch", 1: "speech_len"},
        "logits": {0: "batch"},
    }

    def __init__(self, network: GRULM) -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor, speech_BN: Tensor) -> Tensor:
        """Returns (B, V)."""
        x = torch.cat(
            [self.network.text_embedding(text_BL), self.network.speech_embedding(speech_BN)], dim=1
        )
        return self.network.head(self.network.rnn(x)[0][:, -1])

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random tokens."""
        texts, speeches = (
            embedding.num_embeddings
            for embedding in (self.network.text_embedding, self.network.speech_embedding)
        )
        text_BL = torch.randint(texts, (batch, size), generator=draw)
        return text_BL, torch.randint(speeches, (batch, 2 * size), generator=draw)
