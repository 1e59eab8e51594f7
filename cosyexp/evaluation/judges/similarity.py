"""The judge similarity: whether a recording and speech sound like the same speaker.

S samples, T frames, F mel bands, W windows, E embedding.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional

from cosyexp.device import inference_device
from cosyexp.errors import MissingPackageError
from cosyexp.evaluation.judges.base import Speech, Verdict
from cosyexp.evaluation.scores import Score
from cosyexp.models.layers.spectrogram import mel_filters
from cosyexp.registry import register

RATE, FFT, HOP, BANDS = 16000, 400, 160, 40  # Hz, samples, samples, mel bands
WINDOW, STEP = 160, 80  # frames that are embedded at once
QUIETEST = 1e-3  # mean power (-30 dB); quieter speech is amplified to it


class SpeakerEncoder(nn.Module):
    """The speaker encoder of Wan et al. (2018), "Generalized end-to-end loss".

    With the weights of Resemblyzer it gives that package's embeddings, but for the silence between
    words, which is kept. The package is not imported: it needs functions of scipy that are gone.
    """

    filters: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        filters = mel_filters(RATE, FFT, BANDS, 0.0, RATE / 2)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)

    def forward(self, wave_S: Tensor) -> Tensor:
        """Returns the embedding of a waveform at 16 kHz, (E,), of length 1."""
        spectrum = torch.stft(
            wave_S, FFT, HOP, window=self.window, pad_mode="constant", return_complex=True
        )
        mel_TF = (self.filters @ spectrum.abs().square()).T
        mel_TF = functional.pad(mel_TF, (0, 0, 0, max(0, WINDOW - len(mel_TF))))
        windows_WTF = mel_TF.unfold(0, WINDOW, STEP).transpose(1, 2)
        _, (hidden, _) = self.lstm(windows_WTF)
        embeddings_WE = functional.normalize(self.linear(hidden[-1]).relu(), dim=1)
        return functional.normalize(embeddings_WE.mean(dim=0), dim=0)


@register("judge")
class SpeakerSimilarity:
    """Cosine of the speaker embeddings of speech and of the recording.

    Args:
        device: where it runs, see `select_device`.
    """

    metrics = {"similarity": "max"}

    def __init__(self, *, device: str = "auto") -> None:
        self.choice = device

    def load(self) -> None:
        """Loads the weights.

        Raises:
            MissingPackageError: they are not installed.
        """
        package = find_spec("resemblyzer")
        if package is None or package.origin is None:
            raise MissingPackageError(
                "resemblyzer is not installed: pip install --no-deps resemblyzer"
            )
        self.device, self.encoder = inference_device(self.choice), SpeakerEncoder()
        path = Path(package.origin).with_name("pretrained.pt")
        stored = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        expected = self.encoder.state_dict()
        self.encoder.load_state_dict({name: stored[name] for name in expected})
        self.encoder.eval().to(self.device)

    def __call__(self, speech: Speech) -> Verdict:
        """Returns the cosine, of 1 for equal speech; nothing for a recording itself."""
        if speech.reference_S is None:
            return Verdict({})
        one, other = (
            self.embed(wave, speech.sample_rate) for wave in (speech.wave_S, speech.reference_S)
        )
        return Verdict({"similarity": Score(float(one @ other))})

    @torch.inference_mode()
    def embed(self, wave_S: np.ndarray, sample_rate: int) -> Tensor:
        """Returns the embedding of a waveform, (E,)."""
        resampled = soxr.resample(wave_S, sample_rate, RATE).astype(np.float32)
        wave = torch.from_numpy(resampled)
        power = float(wave.square().mean())
        if 0 < power < QUIETEST:
            wave = wave * (QUIETEST / power) ** 0.5
        return self.encoder(wave.to(self.device)).cpu()
