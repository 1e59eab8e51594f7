"""The one use of the global generator: dropout. Every other draw is keyed to its row (`cosyexp.data.draws`)."""

import torch

from cosyexp.data.draws import keyed


def seed_forward(*key: int) -> None:
    """Makes the dropout of the next forward a pure function of (seed, step, micro-batch, turn), on whatever rank it runs."""
    torch.manual_seed(int(keyed(*key).integers(2**62)))
