"""Input features of the trained front ends; mel and F0 of the models are in test_details.py."""

import numpy as np
import pytest
import soxr
import torch

from cosyexp.data.frontends.onnx import filter_bank
from cosyexp.models.layers.spectrogram import WhisperMel


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_of_whisper(fixture, close, bins):
    numbers = fixture("features")
    close(
        f"{bins} bins", WhisperMel(bins)(numbers["wave16000"][0]), numbers[f"whisper_mel{bins}"][0]
    )


def test_filter_banks_of_kaldi(fixture, close):
    numbers = fixture("features")
    close("banks", filter_bank(numbers["wave16000"][0].numpy()), numbers["kaldi_fbank80"])


@pytest.mark.parametrize(
    ("source", "target"), [(24000, 16000), (22050, 16000), (16000, 24000), (24000, 22050)]
)
def test_resampling(fixture, source, target):
    """Equal to 0.1 % below 0.8 of the lower Nyquist frequency: our filter has a steeper edge."""
    numbers = fixture("features")
    found = soxr.resample(numbers[f"wave{source}"][0].numpy(), source, target)
    wanted = numbers[f"resample_{source}_{target}"][0]
    assert len(found) == len(wanted)
    window = torch.hann_window(len(wanted))
    ours, theirs = (torch.fft.rfft(torch.as_tensor(wave) * window) for wave in (found, wanted))
    below = np.arange(len(ours)) * target / len(wanted) < 0.8 * min(source, target) / 2
    assert (ours - theirs)[below].norm() < 1e-3 * theirs[below].norm()
