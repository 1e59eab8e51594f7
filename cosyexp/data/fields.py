"""Fields: what the models read of an utterance, each computed from a row of a shard.

A field is a small frozen dataclass. Its `repr` is part of the key of its cache, so its values must
be whatever changes its numbers. To add a field, write such a class with `columns`, `dtype`, `width`
and a call that takes an `Utterance`.

F mel bands, T mel frames.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import numpy as np
import torch

from cosyexp.data import features
from cosyexp.data.tokenizers import Tokenizer
from cosyexp.data.utterance import Utterance
from cosyexp.models.layers.spectrogram import SILENCE, MelSpectrogram

SLACK = 0.5  # seconds by which speech tokens and audio may differ: trimmed silence, the last token


class Field(Protocol):
    """Protocol of fields: an array computed from an utterance.

    Attributes:
        columns: the columns of a shard that it reads.
        dtype: type of its numbers.
    """

    columns: ClassVar[tuple[str, ...]]
    dtype: ClassVar[type]

    @property
    def width(self) -> int:
        """Numbers per time step."""
        ...

    def __call__(self, utterance: Utterance) -> np.ndarray:
        """Returns the field of an utterance, (time * width,) of `dtype`.

        Raises:
            ValueError: if the utterance cannot be used, with the reason as the message.
        """
        ...


def cache_name(field: Field) -> str:
    """Returns the name of the file that caches a field of a shard.

    It is a hash of the settings of the field and of the files of its tokenizer.
    """
    name = type(field).__name__.lower()
    content = getattr(getattr(field, "tokenizer", None), "content", "")
    key = hashlib.blake2b(f"{field!r}{content}".encode(), digest_size=4).hexdigest()
    return f"{name}-{key}.arrow"


@dataclass(frozen=True)
class TextTokens:
    """Token ids of the text.

    Raises:
        ValueError: on a call, if the text is not a string or has no token.
    """

    columns: ClassVar[tuple[str, ...]] = ("text",)
    dtype: ClassVar[type] = np.int32
    width: ClassVar[int] = 1
    tokenizer: Tokenizer

    def __call__(self, utterance: Utterance) -> np.ndarray:
        if not isinstance(utterance["text"], str):
            raise ValueError(f"the text {utterance['text']!r} is not a string")
        tokens = np.array(self.tokenizer.encode(utterance["text"]), np.int32)
        if not tokens.size:
            raise ValueError(
                f"the text {utterance['text']!r} has no character that the tokenizer knows"
            )
        return tokens


@dataclass(frozen=True)
class InstructTokens:
    """Token ids of the instruction, which describes how an utterance is spoken.

    Attributes:
        tokenizer: text tokenizer of the family.
        default: instruction of the rows that have none.

    Raises:
        ValueError: on a call, if the instruction is not a string.
    """

    columns: ClassVar[tuple[str, ...]] = ("instruct",)
    dtype: ClassVar[type] = np.int32
    width: ClassVar[int] = 1
    tokenizer: Tokenizer
    default: str

    def __call__(self, utterance: Utterance) -> np.ndarray:
        instruct = utterance.row.get("instruct") or self.default
        if not isinstance(instruct, str):
            raise ValueError(f"the instruct {instruct!r} is not a string")
        return np.array(self.tokenizer.encode(instruct), np.int32)


@dataclass(frozen=True)
class SpeechTokens:
    """Speech tokens of the utterance.

    Attributes:
        vocabulary: number of different speech tokens.

    Raises:
        ValueError: on a call, if a token is not an integer or is outside the vocabulary.
    """

    columns: ClassVar[tuple[str, ...]] = ("speech_token",)
    dtype: ClassVar[type] = np.int32
    width: ClassVar[int] = 1
    vocabulary: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return self.checked(utterance.numbers("speech_token"))

    def checked(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the tokens as int32.

        Raises:
            ValueError: if a token is not an integer or is outside the vocabulary.
        """
        if (tokens % 1).any():
            raise ValueError("the speech tokens are not integers")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(
                f"the speech token {tokens.max()} is outside the vocabulary of {self.vocabulary}"
            )
        return tokens.astype(np.int32)


@dataclass(frozen=True)
class AlignedTokens(SpeechTokens):
    """Speech tokens that last as long as the audio.

    Attributes:
        rate: tokens per second.
        sample_rate: at which the audio is decoded, in Hz.

    Raises:
        ValueError: on a call, if the tokens have another rate or belong to another recording.
    """

    columns: ClassVar[tuple[str, ...]] = ("speech_token", "audio_data")
    rate: int
    sample_rate: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        tokens = super().__call__(utterance)
        token_seconds = len(tokens) / self.rate
        audio_seconds = len(utterance.wave(self.sample_rate)) / self.sample_rate
        if abs(token_seconds - audio_seconds) > max(SLACK, 0.1 * audio_seconds):
            raise ValueError(
                f"the {len(tokens)} speech tokens last {token_seconds:.1f} s at {self.rate} per "
                f"second, but the audio lasts {audio_seconds:.1f} s"
            )
        return tokens


@dataclass(frozen=True)
class RejectedTokens(SpeechTokens):
    """Speech tokens of the rejected answer of a preference pair.

    A row without them is not a pair: it is left out, but does not count as a fault.
    """

    columns: ClassVar[tuple[str, ...]] = ("reject_speech_token",)
    may_lack: ClassVar[bool] = True

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return self.checked(utterance.numbers("reject_speech_token"))


@dataclass(frozen=True)
class SpeakerEmbedding:
    """Speaker embedding of the utterance, or of its speaker.

    Attributes:
        column: utt_embedding, or spk_embedding, the mean over the utterances of the speaker.
        width: size of an embedding.

    Raises:
        ValueError: on a call, if the embedding has another size.
    """

    columns: ClassVar[tuple[str, ...]] = ("utt_embedding", "spk_embedding")
    dtype: ClassVar[type] = np.float32
    column: str
    width: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        embedding = utterance.numbers(self.column).astype(np.float32)
        if len(embedding) != self.width:
            raise ValueError(
                f"the {self.column} has {len(embedding)} numbers instead of {self.width}"
            )
        return embedding


@dataclass(frozen=True)
class Wave:
    """Waveform as 16-bit samples.

    Attributes:
        sample_rate: in Hz; the audio is resampled to it.
    """

    columns: ClassVar[tuple[str, ...]] = ("audio_data",)
    dtype: ClassVar[type] = np.int16
    width: ClassVar[int] = 1
    sample_rate: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return np.round(utterance.wave(self.sample_rate) * 32767).astype(np.int16)


@dataclass(frozen=True)
class Mel:
    """Log-mel spectrogram of the whole utterance, frame after frame.

    Attributes:
        sample_rate: of the audio, in Hz.
        n_fft: size of the FFT, in samples.
        hop: samples of a frame.
        win: size of the window, in samples.
        bins: number of mel bands.
        fmin: lowest frequency, in Hz.
        fmax: highest frequency, in Hz; None: half the sample rate.
        mean: subtracted from the log-mel; 0 with `std` 1 keeps the scale of the original CosyVoice.
        std: divides the log-mel.
        align: pads the audio with silence to a multiple of so many samples, so that the frames
            cover whole speech tokens.

    Raises:
        ValueError: on a call, if the audio is shorter than one frame.
    """

    columns: ClassVar[tuple[str, ...]] = ("audio_data",)
    dtype: ClassVar[type] = np.float32
    sample_rate: int
    n_fft: int
    hop: int
    win: int
    bins: int
    fmin: float
    fmax: float | None
    mean: float = 0.0
    std: float = 1.0
    align: int = 1

    @property
    def width(self) -> int:
        """Number of mel bands."""
        return self.bins

    def __call__(self, utterance: Utterance) -> np.ndarray:
        wave = utterance.wave(self.sample_rate)
        if len(wave) < self.n_fft:
            raise ValueError(f"the audio of {len(wave)} samples is shorter than one frame")
        wave = np.pad(wave, (0, -len(wave) % self.align))
        mel_FT = spectrogram(self)(torch.from_numpy(wave)[None])[0].numpy()
        return ((mel_FT.T - self.mean) / self.std).astype(np.float32, copy=False).reshape(-1)

    @property
    def silence(self) -> float:
        """Value of every band in silence."""
        return (SILENCE - self.mean) / self.std


@cache
def spectrogram(mel: Mel) -> MelSpectrogram:
    """Returns the module that computes a `Mel`, built once for equal settings."""
    return MelSpectrogram(
        sample_rate=mel.sample_rate,
        n_fft=mel.n_fft,
        hop=mel.hop,
        win=mel.win,
        bins=mel.bins,
        fmin=mel.fmin,
        fmax=mel.fmax,
    )


@dataclass(frozen=True)
class F0:
    """F0 of the whole utterance in Hz, one value per mel frame, 0 where unvoiced.

    Attributes:
        sample_rate: of the audio, in Hz.
        hop: samples of a frame.
        method: "harvest" or "dio", see `features.pitch`.
    """

    columns: ClassVar[tuple[str, ...]] = ("audio_data",)
    dtype: ClassVar[type] = np.float32
    width: ClassVar[int] = 1
    sample_rate: int
    hop: int
    method: str

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return features.pitch(
            utterance.wave(self.sample_rate), self.sample_rate, self.hop, self.method
        )
