import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.apps.warm import Warm, warm_process
from tests.support import MODELS, contents, sentence, train_words


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


@pytest.fixture
def refused(warm, tmp_path) -> Callable[..., str]:
    """Runs an app in `tmp_path`, which says one sentence with all `parts`, and changes no file there."""

    def refused(app: str, words: Sequence[str], *parts: str) -> str:
        before = contents(tmp_path)
        result = warm(app, *words, cwd=tmp_path, check=False)
        said = sentence(result, *parts)
        assert result.stderr.strip() == said
        assert contents(tmp_path) == before
        return result.stdout

    return refused


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """Copies of the trained runs, in runs/demo/ of `tmp_path`."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs/demo"
