"""The random numbers of synthesis, which do not depend on batches, pieces or backends."""

import hashlib

import torch
from torch import Tensor

BLOCK = 64  # frames that are drawn at a time


def drawer(*key: object) -> torch.Generator:
    """Returns a random generator that is seeded by a key, such as seed, piece and model."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class FrameNoise:
    """Standard normal noise of consecutive frames, however many are asked for at a time.

    Args:
        draw: random generator.
        shape: of the noise of a frame.
    """

    def __init__(self, draw: torch.Generator, *shape: int) -> None:
        self.draw, self.shape, self.left = draw, shape, torch.empty(0, *shape)

    def __call__(self, frames: int) -> Tensor:
        """Returns the noise of the next frames, (frames, *shape)."""
        blocks = [self.left]
        while sum(map(len, blocks)) < frames:
            blocks.append(torch.randn(BLOCK, *self.shape, generator=self.draw))
        noise = torch.cat(blocks)
        self.left = noise[frames:]
        return noise[:frames]
