"""What is done to a recording before it is encoded: its text written out, its audio normalized.

S samples, C channels.
"""

import io
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile

from cosyexp.data.features import mono
from cosyexp.data.frontends.base import SAMPLE_RATE
from cosyexp.data.quality import HOP, frame_power, letters, loud_frames, loudness, measure
from cosyexp.errors import UserError

KEPT = 0.1  # seconds of silence that trimming leaves at both ends
LANGUAGES = ("en", "zh", "ja", "auto")


class Transcriber(Protocol):
    """Protocol of speech recognizers, which are small frozen dataclasses.

    They are pickled to the processes that use them.
    """

    @property
    def key(self) -> str:
        """A string that changes when the texts do."""
        ...

    def __call__(self, wave_S: np.ndarray, sample_rate: int) -> str:
        """Returns the text of a waveform (S,); empty if there is no speech."""
        ...

    def error_rate(self, text: str, heard: str) -> float:
        """Returns the word errors of what was heard, as a share of the words of the text."""
        ...


class Sound(NamedTuple):
    """The decoded audio of a recording.

    Attributes:
        speech_S: at 16 kHz, mixed to mono.
        audio: bytes of an audio file with it; None: it is the recording's whole file.
        samples_SC: as recorded.
        rate: of `samples_SC`, in Hz.
    """

    speech_S: np.ndarray
    audio: bytes | None
    samples_SC: np.ndarray
    rate: int


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """Settings of what is done to each recording.

    Attributes:
        transcribe: gives the text of recordings without one.
        verify: hears each recording, for the word error rate of its text.
        normalize: language whose numbers and abbreviations are written as words: en, zh, ja or
            auto; None: none are.
        trim: whether silence at both ends is cut.
        loudness: integrated loudness in LUFS that the audio is scaled to; None: unchanged.
    """

    transcribe: Transcriber | None = None
    verify: Transcriber | None = None
    normalize: str | None = None
    trim: bool = False
    loudness: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change the data, without those that are off."""
        found = {
            "transcribe": self.transcribe and self.transcribe.key,
            "verify": self.verify and self.verify.key,
            "normalize": self.normalize,
            "trim": self.trim,
            "loudness": self.loudness,
        }
        return {name: value for name, value in found.items() if value not in (None, False)}

    def describe(self, text: str, sound: Sound) -> dict[str, Any]:
        """Returns the text of a recording, its measures, and what verify heard, by column.

        Args:
            text: as the corpus gives it; empty if it gives none.
            sound: as recorded.

        Raises:
            ValueError: there is no text, or it cannot be normalized.
        """
        values: dict[str, Any] = measure(sound.samples_SC, sound.rate, sound.speech_S)
        if not text.strip() and self.transcribe is not None:
            text = self.transcribe(sound.speech_S, SAMPLE_RATE)
            if not text.strip():
                raise ValueError("no speech is heard in it")
        if self.normalize:
            text = in_words(text, self.normalize)
        seconds = len(sound.speech_S) / SAMPLE_RATE
        values["cps"] = letters(text) / max(seconds * (1 - values["silence"]), 0.1)
        if self.verify is not None:
            values["heard"] = self.verify(sound.speech_S, SAMPLE_RATE)
            values["wer"] = self.verify.error_rate(text, values["heard"])
        return {"text": text, **values}

    def sound(self, sound: Sound) -> Sound:
        """Returns the audio trimmed and at the wanted loudness, as a FLAC file in memory.

        Raises:
            ValueError: it cannot be FLAC, as it has more than eight channels.
        """
        if not self.trim and self.loudness is None:
            return sound
        samples_SC, rate, gain = sound.samples_SC, sound.rate, 1.0
        if self.trim:
            start, end = speech_edges(sound.speech_S)
            samples_SC = samples_SC[round(start * rate) : round(end * rate)]
        if self.loudness is not None:
            gain = 10 ** ((self.loudness - loudness(samples_SC.mean(1), rate)) / 20)
        samples_SC = samples_SC * min(gain, 1 / np.abs(samples_SC).max())
        file = io.BytesIO()
        try:
            soundfile.write(file, samples_SC, rate, format="FLAC", subtype="PCM_16")
        except soundfile.SoundFileError as error:
            raise ValueError(f"the audio cannot be written as FLAC ({error})") from None
        return Sound(mono(samples_SC, rate, SAMPLE_RATE), file.getvalue(), samples_SC, rate)


def speech_edges(speech_S: np.ndarray) -> tuple[float, float]:
    """Returns where the speech in a waveform at 16 kHz begins and ends, in seconds, with `KEPT`."""
    loud = np.flatnonzero(loud_frames(frame_power(speech_S)))
    start, end = loud[0] * HOP / SAMPLE_RATE, (loud[-1] + 1) * HOP / SAMPLE_RATE
    return max(start - KEPT, 0.0), min(end + KEPT, len(speech_S) / SAMPLE_RATE)


def in_words(text: str, language: str) -> str:
    """Returns a text with numbers, dates, units and abbreviations written as words, by wetext.

    Args:
        text: the text; white space becomes single spaces.
        language: en, zh, ja or auto.

    Raises:
        ValueError: wetext cannot read the text.
    """
    try:
        words: str = normalizer(language).normalize(" ".join(text.split()))
    except AssertionError:
        raise ValueError(f"the text cannot be normalized as {language}") from None
    return words.replace('\\"', '"').replace("\\\\", "\\")  # wetext escapes both


@cache
def normalizer(language: str) -> Any:
    """Returns wetext's normalizer for a language, opened once per process.

    Raises:
        UserError: the language is unknown, or wetext is not installed.
    """
    if language not in LANGUAGES:
        raise UserError(f"normalize={language} is not known: give {', '.join(LANGUAGES)} or null")
    try:
        from wetext import Normalizer
    except ImportError:
        raise UserError('wetext is not installed: pip install "cosyexp[speech]"') from None
    return Normalizer(lang=language, operator="tn")
