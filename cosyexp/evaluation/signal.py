"""Distances of generated speech to a recording of the same length.

S samples, T mel frames, F mel bands, K frequency bins, C cepstral coefficients.
"""

import math

import numpy as np
import torch

# FFT size, hop and window in samples (Yamamoto et al. 2020, "Parallel WaveGAN", table 1)
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
CEPSTRUM = 13  # coefficients of the mel-cepstral distortion, without the one of the loudness


def mel_l1(found_FT: np.ndarray, wanted_FT: np.ndarray) -> float:
    """Returns the mean absolute difference of two log-mel spectrograms, in nepers."""
    return float(np.abs(found_FT - wanted_FT).mean())


def mel_cepstral_distortion(found_FT: np.ndarray, wanted_FT: np.ndarray) -> float:
    """Returns the mel-cepstral distortion of two log-mel spectrograms in dB (Kubichek 1993).

    It is the mean over frames of 10 / ln 10 * sqrt(2 * sum_c (x_c - y_c)^2), for the cepstral
    coefficients c = 1..13 of the log-mel spectrogram: x_c = 2 / F * sum_f x_f cos(pi c (f + 1/2) /
    F). Frames are compared as they stand, without dynamic time warping.

    Args:
        found_FT: natural logarithms of mel magnitudes.
        wanted_FT: those of the recording.
    """
    bands = len(found_FT)
    orders_C, centers_F = np.arange(1, CEPSTRUM + 1), np.arange(bands) + 0.5
    basis_CF = 2 / bands * np.cos(math.pi / bands * orders_C[:, None] * centers_F)
    difference_CT = basis_CF @ (found_FT - wanted_FT)
    distortion_T = 10 / math.log(10) * np.sqrt(2 * np.square(difference_CT).sum(axis=0))
    return float(distortion_T.mean())


def stft_distances(found_S: np.ndarray, wanted_S: np.ndarray) -> tuple[float, float]:
    """Returns the multi-resolution STFT distances (Yamamoto et al. 2020, "Parallel WaveGAN").

    Returns:
        The spectral convergence, and the mean absolute difference of the log-magnitudes; both are
        means over three resolutions.
    """
    convergences, differences = [], []
    for size, hop, window in RESOLUTIONS:
        found, wanted = (_magnitude(x, size, hop, window) for x in (found_S, wanted_S))
        convergences.append(float((wanted - found).norm() / wanted.norm()))
        differences.append(float((wanted.log() - found.log()).abs().mean()))
    return float(np.mean(convergences)), float(np.mean(differences))


def _magnitude(wave_S: np.ndarray, size: int, hop: int, window: int) -> torch.Tensor:
    spectrum_KT = torch.stft(
        torch.from_numpy(wave_S).double(),
        size,
        hop,
        window,
        torch.hann_window(window, dtype=torch.float64),
        pad_mode="constant",
        return_complex=True,
    )
    return spectrum_KT.abs().square().clamp(min=1e-7).sqrt()


def pitch_rmse(found_T: np.ndarray, wanted_T: np.ndarray) -> float | None:
    """Returns the root mean squared difference of two F0 curves in cents.

    Args:
        found_T: F0 in Hz, 0 where unvoiced.
        wanted_T: that of the recording.

    Returns:
        The difference over the frames that are voiced in both; None if there are none.
    """
    voiced = (found_T > 0) & (wanted_T > 0)
    if not voiced.any():
        return None
    cents = 1200 * np.log2(found_T[voiced].astype(np.float64) / wanted_T[voiced])
    return float(np.sqrt(np.square(cents).mean()))


def voicing_error(found_T: np.ndarray, wanted_T: np.ndarray) -> float:
    """Returns the share of frames that are voiced in one of two F0 curves only."""
    return float(((found_T > 0) != (wanted_T > 0)).mean())
