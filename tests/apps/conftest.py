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
    """A folder with a run of four steps of each model, runs/demo/llm, ...; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    for model in MODELS:
        warm("train", *train_words(model, data, "trainer.steps=4"), cwd=folder)
    return folder


@pytest.fixture
def refused(warm: Warm, tmp_path: Path) -> Callable[..., str]:
    """Runs an app that must fail with one sentence, which holds all `parts`, and change no file.

    Returns what it printed to stdout.
    """

    def refused(app: str, words: Sequence[str], *parts: str) -> str:
        before = contents(tmp_path)
        result = warm(app, *words, cwd=tmp_path, check=False)
        output = sentence(result, *parts)
        assert result.stderr.strip() == output
        assert contents(tmp_path) == before
        return result.stdout

    return refused


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Copies of the trained runs, in runs/demo/ of `tmp_path`."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs/demo"
