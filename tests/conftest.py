import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from cosyexp.data.corpora.demo import Demo
from cosyexp.data.preparation import Options, prepare

torch.set_num_threads(1)

CORPUS = {"name": "demo", "minutes": 1.5, "held_out": 0.2, "seed": 0}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute and a half of demo speech, prepared."""
    out = tmp_path_factory.mktemp("data") / "demo"
    rates = {"token_rate": 50, "codes": 512, "speaker_dim": 192}
    prepare(Demo(**CORPUS), out, Options(**rates, shard_size=16, processes=1), {"corpus": CORPUS, **rates})
    return out
