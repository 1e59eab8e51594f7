"""What the models read of an utterance: fields, each computed from a row of a shard.

A field is a small frozen dataclass: its values are whatever changes its numbers, and so the key of its cache. To add one, write
such a class with `columns`, `dtype`, `width` (numbers a step in time) and a call that takes an `Utterance`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from cosyexp.data import features
from cosyexp.data.tokenizers import Tokenizer
from cosyexp.models.layers.spectrogram import SILENCE, MelSpectrogram

LACKS = "it has no "  # how the reason begins for a column that is not there, null or empty
SLACK = 0.5  # seconds by which speech tokens and audio may differ: trimmed silence, the last token


class Utterance:
    """One row of a shard, its audio decoded once. Accessors raise ValueError where the row lacks what they give."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self._waves: dict[int, np.ndarray] = {}

    def __getitem__(self, column: str) -> Any:
        value = self.row.get(column)
        if value is None or (hasattr(value, "__len__") and len(value) == 0):
            raise ValueError(f"{LACKS}{column}")
        return value

    def numbers(self, column: str) -> np.ndarray:
        """A list of finite numbers, or the bytes of a float32 array, (size,)."""
        value = self[column]
        try:
            numbers = (
                np.frombuffer(value, np.float32) if isinstance(value, bytes) else np.array(value)
            )
        except ValueError:  # ragged, or no whole number of numbers
            raise ValueError(f"its {column} is no list of numbers") from None
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
            raise ValueError(f"its {column} is no list of finite numbers")
        return numbers

    def wave(self, sample_rate: int) -> np.ndarray:
        """Mono float32 in [-1, 1], rounded to 16 bits, so that a cached wave is the same as a computed one."""
        if sample_rate not in self._waves:
            audio = self["audio_data"]
            if not isinstance(audio, bytes | str):  # a number would be taken for an open file
                raise ValueError("its audio_data are not the bytes of an audio file")
            wave = features.read_wave(audio, sample_rate)
            self._waves[sample_rate] = (
                np.round(wave * 32767).astype(np.int16).astype(np.float32) / 32767
            )
        return self._waves[sample_rate]


class Field(Protocol):
    """An array computed from an utterance, (time * width,) of `dtype`."""

    columns: ClassVar[tuple[str, ...]]
    dtype: ClassVar[type]

    @property
    def width(self) -> int: ...

    def __call__(self, utterance: Utterance) -> np.ndarray: ...


def cache_name(field: Field) -> str:
    """The name of the file that holds this field of a shard: another setting, another file."""
    name, content = (
        type(field).__name__.lower(),
        getattr(getattr(field, "tokenizer", None), "content", ""),
    )
    return (
        f"{name}-{hashlib.blake2b(f'{field!r}{content}'.encode(), digest_size=4).hexdigest()}.arrow"
    )


@dataclass(frozen=True)
class TextTokens:
    columns: ClassVar[tuple[str, ...]] = ("text",)
    dtype: ClassVar[type] = np.int32
    width: ClassVar[int] = 1
    tokenizer: Tokenizer

    def __call__(self, utterance: Utterance) -> np.ndarray:
        if not isinstance(utterance["text"], str):
            raise ValueError(f"its text {utterance['text']!r} is no text")
        tokens = np.array(self.tokenizer.encode(utterance["text"]), np.int32)
        if not tokens.size:
            raise ValueError(f"its text {utterance['text']!r} has nothing that the tokenizer knows")
        return tokens


@dataclass(frozen=True)
class InstructTokens:
    """What an utterance was asked to sound like. `default`: for a row that does not say."""

    columns: ClassVar[tuple[str, ...]] = ("instruct",)
    dtype: ClassVar[type] = np.int32
    width: ClassVar[int] = 1
    tokenizer: Tokenizer
    default: str

    def __call__(self, utterance: Utterance) -> np.ndarray:
        instruct = utterance.row.get("instruct") or self.default
        if not isinstance(instruct, str):
            raise ValueError(f"its instruct {instruct!r} is no text")
        return np.array(self.tokenizer.encode(instruct), np.int32)


@dataclass(frozen=True)
class SpeechTokens:
    columns: ClassVar[tuple[str, ...]] = ("speech_token",)
    dtype: ClassVar[type] = np.int32
    width: ClassVar[int] = 1
    vocabulary: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return self.checked(utterance.numbers("speech_token"))

    def checked(self, tokens: np.ndarray) -> np.ndarray:
        if (tokens % 1).any():
            raise ValueError("its speech tokens are no whole numbers")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(
                f"its speech token {tokens.max()} is outside the vocabulary of {self.vocabulary}"
            )
        return tokens.astype(np.int32)


@dataclass(frozen=True)
class AlignedTokens(SpeechTokens):
    """Speech tokens that last as long as the audio: those of another rate, or of another recording, are refused.

    rate: tokens a second.
    """

    columns: ClassVar[tuple[str, ...]] = ("speech_token", "audio_data")
    rate: int
    sample_rate: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        tokens = super().__call__(utterance)
        said, heard = (
            len(tokens) / self.rate,
            len(utterance.wave(self.sample_rate)) / self.sample_rate,
        )
        if abs(said - heard) > max(SLACK, 0.1 * heard):
            raise ValueError(
                f"its {len(tokens)} speech tokens are {said:.1f} s at {self.rate} a second, its audio {heard:.1f} s"
            )
        return tokens


@dataclass(frozen=True)
class RejectedTokens(SpeechTokens):
    """The answer that is not to be given; a row without one is no pair, and no fault."""

    columns: ClassVar[tuple[str, ...]] = ("reject_speech_token",)
    may_lack: ClassVar[bool] = True

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return self.checked(utterance.numbers("reject_speech_token"))


@dataclass(frozen=True)
class SpeakerEmbedding:
    """`column`: utt_embedding, or spk_embedding, the mean over a speaker's utterances."""

    columns: ClassVar[tuple[str, ...]] = ("utt_embedding", "spk_embedding")
    dtype: ClassVar[type] = np.float32
    column: str
    width: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        embedding = utterance.numbers(self.column).astype(np.float32)
        if len(embedding) != self.width:
            raise ValueError(
                f"its {self.column} has {len(embedding)} numbers instead of {self.width}"
            )
        return embedding


@dataclass(frozen=True)
class Wave:
    """16-bit samples."""

    columns: ClassVar[tuple[str, ...]] = ("audio_data",)
    dtype: ClassVar[type] = np.int16
    width: ClassVar[int] = 1
    sample_rate: int

    def __call__(self, utterance: Utterance) -> np.ndarray:
        return np.round(utterance.wave(self.sample_rate) * 32767).astype(np.int16)


@dataclass(frozen=True)
class Mel:
    """Log-mel of the whole utterance, frame after frame, less `mean` and over `std`: 0 and 1 leave it as the families have it.

    align: the wave is padded with silence to a multiple of that many samples, so that frames come in whole speech tokens.
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
        return self.bins

    def __call__(self, utterance: Utterance) -> np.ndarray:
        wave = utterance.wave(self.sample_rate)
        if len(wave) < self.n_fft:
            raise ValueError(f"its audio of {len(wave)} samples is shorter than one frame")
        wave = np.pad(wave, (0, -len(wave) % self.align))
        mel_FT = spectrogram(self)(torch.from_numpy(wave)[None])[0].numpy()
        return ((mel_FT.T - self.mean) / self.std).astype(np.float32, copy=False).reshape(-1)

    @property
    def silence(self) -> float:
        """The value of every band where there is no sound."""
        return (SILENCE - self.mean) / self.std


@cache
def spectrogram(mel: Mel) -> MelSpectrogram:
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
    """F0 of the whole utterance, a value a mel frame."""

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
