"""The speech recognizer as `prepare` uses it, to write texts and to check them. S samples."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.metrics import word_error_rate
from cosyexp.registry import register


@register("transcriber")
@dataclass(frozen=True, kw_only=True)
class WhisperTranscriber:
    """Transcribes recordings with Whisper, see `WhisperASR`, which is opened once per process.

    Attributes:
        model: folder of a model in the format of CTranslate2; None: whisper-base, which the extra
            `eval` installs.
        language: such as "en"; None: detected in each recording.
        suppress_numerals: whether numbers are written as words, as they are spoken.
        device: where it runs, see `select_device`.
    """

    model: str | None = None
    language: str | None = None
    suppress_numerals: bool = True
    device: str = "auto"

    @property
    def key(self) -> str:
        """The settings that the texts depend on."""
        return f"whisper {self.model} {self.language} {self.suppress_numerals}"

    def __call__(self, wave_S: np.ndarray, sample_rate: int) -> str:
        """Returns the text of a waveform (S,)."""
        asr = opened(self.model, self.language, self.suppress_numerals, self.device)
        return asr(wave_S, sample_rate)

    def error_rate(self, text: str, heard: str) -> float:
        """Returns the word error rate of what was heard."""
        return word_error_rate(text, heard)


@cache
def opened(
    model: str | None, language: str | None, suppress_numerals: bool, device: str
) -> WhisperASR:
    """Returns the recognizer with these settings; raises a UserError as `WhisperASR` does."""
    return WhisperASR(Path(model) if model else None, language, device, suppress_numerals)
