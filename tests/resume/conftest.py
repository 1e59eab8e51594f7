"""Fixtures of the tests that kill runs, which are a file per model for pytest-xdist."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.apps.conftest import warm
from tests.apps.warm import Warm
from tests.resume.checks import hashes
from tests.support import checkpoints, metrics, train_words

__all__ = ["warm"]

STEPS = 12
EVERY = [
    f"trainer.steps={STEPS}",
    "trainer.valid_every=4",
    "checkpoint.every=2",
    "checkpoint.keep_best=2",
]
VARIANTS = {
    "plain": [],
    "workers": ["data.workers=2"],
    "accumulate": ["trainer.accumulate=2", "trainer.valid_epochs=1"],
    "ema": ["trainer.ema=0.9", "trainer.running_sum=true", "trainer.max_grad_norm=1.0"],
}
# where each start is killed, see killer.py; the start after the last one is not
DEATHS = [("update", 6), ("weights", 2), ("step", 2), ("update", 4), ("rename", 2), ("meta", 1)]
STRAIGHT = {"workers": "plain"}  # data workers change no number, so the plain run is the reference


@pytest.fixture(scope="module")
def straight(
    data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Returns the uninterrupted run of a model and a variant, and trains it the first time."""
    folder = tmp_path_factory.mktemp("straight")

    def run(model: str, variant: str) -> Path:
        variant = STRAIGHT.get(variant, variant)
        path = folder / model / variant
        if not path.exists():
            words = train_words(model, data, *EVERY, *VARIANTS[variant], f"run_dir={path}")
            warm("train", *words, cwd=folder)
        return path

    return run


@pytest.fixture
def kill_and_restart(
    straight: Callable[[str, str], Path], data: Path, tmp_path: Path, warm: Warm
) -> Callable[[str, str], None]:
    """Kills a run at all points of `DEATHS`, and asserts that it ends like a straight one."""

    def check(model: str, variant: str) -> None:
        words = [*train_words(model, data, *EVERY, *VARIANTS[variant]), "run_dir=killed"]
        for point in DEATHS:
            killed = warm.module("tests.resume.killer", *point, *words, cwd=tmp_path)
            assert killed.returncode == -signal.SIGKILL, (point, killed.stdout, killed.stderr)
        ended = warm("train", *words, cwd=tmp_path)
        assert "resuming at step" in ended.stdout
        run, reference = tmp_path / "killed", straight(model, variant)
        assert hashes(reference, STEPS) and hashes(run, STEPS) == hashes(reference, STEPS)
        assert metrics(run) == metrics(reference)
        assert checkpoints(run) == checkpoints(reference)

    return check
