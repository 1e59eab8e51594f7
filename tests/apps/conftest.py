from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apps.warm import Warm, warm_process
from tests.support import MODELS, train_words


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs apps without waiting for their imports."""
    with warm_process() as warm:
        yield warm


@pytest.fixture(scope="session")
def trained(data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each model, trained for four steps: runs/demo/llm and so on. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    for model in MODELS:
        warm("train", *train_words(model, data, "trainer.steps=4"), cwd=folder)
    return folder
