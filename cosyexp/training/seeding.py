"""Seeds dropout, the only user of torch's global generator.

All other random numbers are drawn per utterance by keyed generators, see `cosyexp.data.draws`.
"""

import torch

from cosyexp.data.draws import keyed


def seed_forward(*key: int) -> None:
    """Seeds the global generator, so that the dropout of the next forward pass is reproducible.

    Args:
        key: seed of the run, step, number of the micro-batch in the step, and index of the
            trainable. So the result does not depend on the rank that runs the micro-batch.
    """
    torch.manual_seed(int(keyed(*key).integers(2**62)))
