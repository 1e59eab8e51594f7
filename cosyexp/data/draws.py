"""Keyed randomness: every draw of a task belongs to a row, and depends on nothing but its key."""

import hashlib

import numpy as np

VALIDATION = -1  # the "epoch" of validation, so that it draws the same each time


def keyed(*key: object) -> np.random.Generator:
    """A generator that is a pure function of its key."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Draws:
    """The draws of one epoch: `draws(utt, "noise")` is the generator of that utterance's noise, whoever asks and whenever."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed = seed
        self.epoch = epoch

    def __call__(self, utt: str, purpose: str) -> np.random.Generator:
        return keyed(self.seed, self.epoch, utt, purpose)
