"""Converts spectrograms to images."""

import numpy as np


def mel_image(mel: np.ndarray) -> np.ndarray:
    """Returns a mel spectrogram (bands, frames) as an RGB image (height, width, 3), uint8.

    Low bands are at the bottom; bright is loud.
    """
    from matplotlib import colormaps

    mel = np.nan_to_num(mel, posinf=0.0, neginf=0.0)  # of a network that diverged
    low, high = np.quantile(mel, [0.01, 0.995])
    level = np.clip((mel[::-1] - low) / max(high - low, 1e-6), 0, 1)
    large = level.repeat(3, axis=0).repeat(2, axis=1)
    image: np.ndarray = colormaps["inferno"](large, bytes=True)[..., :3]
    return image
