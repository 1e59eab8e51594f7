"""Collator of the flow model, which reads speech tokens, a speaker embedding and a mel spectrogram.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyexp.arguments import Share
from cosyexp.data.batch import Batch, lengths, pad
from cosyexp.data.collators.base import Row
from cosyexp.data.draws import Draws
from cosyexp.data.fields import AlignedTokens, Field, Mel, SpeakerEmbedding
from cosyexp.registry import register


@dataclass(frozen=True, kw_only=True)
class FlowBatch(Batch):
    """Padded batch of the flow model, with the random numbers of each row.

    Attributes:
        token_BN: speech tokens.
        token_lens_B: number of speech tokens.
        speaker_BE: speaker embeddings.
        mel_BFT: log-mel spectrograms, the targets.
        mel_lens_B: number of mel frames.
        time_B: time of the flow, uniform in [0, 1).
        noise_BFT: standard normal noise.
        prompt_lens_B: leading mel frames that the model is given as a prompt.
        keep_B: 1 where the conditions are kept, 0 where they are dropped for classifier-free
            guidance.
        streaming_B: True where a frame sees the future only up to the end of its chunk, as in
            streaming synthesis.
    """

    token_BN: Tensor
    token_lens_B: Tensor
    speaker_BE: Tensor
    mel_BFT: Tensor
    mel_lens_B: Tensor
    time_B: Tensor
    noise_BFT: Tensor
    prompt_lens_B: Tensor
    keep_B: Tensor
    streaming_B: Tensor


@register("collator")
class FlowCollator:
    """Makes batches of the flow model; the cost of a row is its number of mel frames.

    Args:
        speech_vocabulary: number of different speech tokens.
        token_rate: speech tokens per second.
        speaker_dim: size of a speaker embedding.
        use_spk_embedding: reads the mean embedding of the speaker instead of the utterance's.
        sample_rate: of the audio that the mel spectrogram is computed from, in Hz.
        mel: the other settings of the field `Mel`.
        frames_per_token: mel frames of a speech token; tokens and mel are cut to this ratio. None:
            any ratio.
        drop: share of the rows whose conditions are dropped for classifier-free guidance.
        prompt: maximum share of the mel that is given as a prompt; half of the rows have no prompt.
        streaming: share of the rows whose frames see the future only up to the end of their chunk.
    """

    def __init__(
        self,
        *,
        speech_vocabulary: int,
        token_rate: int,
        speaker_dim: int,
        use_spk_embedding: bool,
        sample_rate: int,
        mel: Mapping[str, Any],
        frames_per_token: int | None = None,
        drop: Share = 0.2,
        prompt: Share = 0.3,
        streaming: Share = 0.0,
    ) -> None:
        self.frames_per_token = frames_per_token
        self.drop, self.prompt, self.streaming = drop, prompt, streaming
        self.fields: Mapping[str, Field] = {
            "token": AlignedTokens(speech_vocabulary, token_rate, sample_rate),
            "speaker": SpeakerEmbedding(
                "spk_embedding" if use_spk_embedding else "utt_embedding", speaker_dim
            ),
            "mel": Mel(sample_rate=sample_rate, **mel),
        }

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the number of mel frames of each row, after the cut to the ratio."""
        if self.frames_per_token is None:
            return sizes["mel"]
        return self.frames_per_token * np.minimum(
            sizes["token"], sizes["mel"] // self.frames_per_token
        )

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> FlowBatch:
        """Cuts tokens and mel to their ratio, pads them and draws each row's random numbers."""
        token, mel = [row["token"][0] for row in rows], [row["mel"] for row in rows]
        if self.frames_per_token is not None:
            sizes = [
                min(len(t), m.shape[1] // self.frames_per_token)
                for t, m in zip(token, mel, strict=True)
            ]
            token = [t[:size] for t, size in zip(token, sizes, strict=True)]
            mel = [m[:, : size * self.frames_per_token] for m, size in zip(mel, sizes, strict=True)]
        noise = [
            draws(u, "noise").standard_normal(m.shape, dtype=np.float32)
            for u, m in zip(utts, mel, strict=True)
        ]
        return FlowBatch(
            utts=tuple(utts),
            token_BN=pad(token).long(),
            token_lens_B=lengths(token),
            speaker_BE=torch.from_numpy(np.stack([row["speaker"][:, 0] for row in rows])),
            mel_BFT=pad(mel),
            mel_lens_B=lengths(mel),
            time_B=torch.tensor([draws(utt, "time").random(dtype=np.float32) for utt in utts]),
            noise_BFT=pad(noise),
            prompt_lens_B=torch.tensor(
                [
                    self._prompt(m.shape[1], draws(u, "prompt"))
                    for u, m in zip(utts, mel, strict=True)
                ]
            ),
            keep_B=torch.tensor([float(draws(utt, "keep").random() >= self.drop) for utt in utts]),
            streaming_B=torch.tensor(
                [bool(draws(utt, "streaming").random() < self.streaming) for utt in utts]
            ),
        )

    def _prompt(self, frames: int, draw: np.random.Generator) -> int:
        return 0 if draw.random() < 0.5 else int(draw.integers(int(self.prompt * frames) + 1))
