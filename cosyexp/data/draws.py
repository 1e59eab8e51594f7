"""Random numbers that depend only on a key, so that batches do not depend on where they are made.

Every random number that an objective needs belongs to one row of the data and is keyed by (seed,
epoch, utterance, purpose). It is the same on any rank, in any worker process and in any
micro-batch, and there is no generator state to save in a checkpoint.
"""

import hashlib

import numpy as np

VALIDATION = -1  # the "epoch" of validation, so that every validation draws the same numbers


def keyed(*key: object) -> np.random.Generator:
    """Returns a counter-based generator (Philox) seeded by the hash of a key.

    Args:
        key: values that identify the draw; their `str` is hashed.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Draws:
    """The random numbers of one epoch.

    `draws(utt, "noise")` returns the generator for the noise of that utterance. Each call returns
    it at its start, so the order of calls does not matter.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed = seed
        self.epoch = epoch

    def __call__(self, utt: str, purpose: str) -> np.random.Generator:
        return keyed(self.seed, self.epoch, utt, purpose)
