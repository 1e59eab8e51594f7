"""The judge wer: word and character error rates of a speech recognizer."""

from pathlib import Path

from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.judges.base import Speech, Verdict
from cosyexp.evaluation.metrics import character_error_rate, word_error_rate, words
from cosyexp.evaluation.scores import Score
from cosyexp.registry import register


@register("judge")
class ErrorRates:
    """Transcribes speech with Whisper, and counts the errors.

    The mean over utterances is weighted by their words or characters, so that it is the rate of all
    of them together.

    Args:
        asr: folder of a Whisper model (CTranslate2); None: whisper-base, which the extra `eval`
            installs.
        language: such as "en"; None: detected.
        device: where it runs, see `select_device`.
    """

    metrics = {"wer": "min", "cer": "min"}

    def __init__(
        self, *, asr: str | None = None, language: str | None = None, device: str = "auto"
    ) -> None:
        self.model, self.language, self.device = asr, language, device

    def load(self) -> None:
        """Loads the model."""
        folder = Path(self.model) if self.model else None
        self.asr = WhisperASR(folder, self.language, self.device)

    def __call__(self, speech: Speech) -> Verdict:
        """Returns the error rates, and what was heard."""
        heard = self.asr(speech.wave_S, speech.sample_rate)
        spoken = words(speech.text)
        scores = {
            "wer": Score(word_error_rate(speech.text, heard), len(spoken)),
            "cer": Score(character_error_rate(speech.text, heard), len(" ".join(spoken))),
        }
        return Verdict(scores if spoken else {}, {"heard": heard})
