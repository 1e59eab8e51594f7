"""A run of llm that is killed and started again ends like an uninterrupted one, bit by bit."""

import signal

import pytest

from tests.resume.checks import hashes
from tests.resume.conftest import EVERY, STEPS, VARIANTS
from tests.support import metrics, train_words


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_started_again(variant, kill_and_restart):
    kill_and_restart("llm", variant)


def test_an_adapter_is_killed_and_started_again(data, straight, warm, tmp_path):
    adapter = ["adapter=lora", f"init_from={straight('llm', 'plain')}", "trainer.ema=0.9"]
    words = train_words("llm", data, *EVERY, *adapter)
    warm("train", *words, "run_dir=straight", cwd=tmp_path)
    for point in (("weights", 3), ("update", 5)):
        killed = warm.module("tests.resume.killer", *point, *words, "run_dir=killed", cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    warm("train", *words, "run_dir=killed", cwd=tmp_path)
    ends = [hashes(tmp_path / run, STEPS) for run in ("straight", "killed")]
    assert ends[0].keys() == {"adapter_model.safetensors", "ema.safetensors"}
    assert ends[1] == ends[0]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
