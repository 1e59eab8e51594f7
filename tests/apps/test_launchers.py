"""Ranks that another program started train as those that `engine.nproc_per_node` starts."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import command, environment, metrics, train_words

WORDS = ["trainer.steps=3", "trainer.valid_every=3", "run_dir=run"]
WEIGHTS = "run/checkpoints/step_00000003/flow.safetensors"
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "-m"],
    "deepspeed": [
        BIN / "deepspeed",
        "--no_local_rank",
        "--num_accelerators=2",
        "--master_port={port}",
        "--module",
    ],
}


@pytest.fixture(scope="module")
def own(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    command("train", *train_words("flow", data, *WORDS), "engine.nproc_per_node=2", cwd=folder)
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_another_launcher(launcher, own, data, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *(str(word).format(port=port) for word in LAUNCHERS[launcher]),
        "cosyexp.train",
        *train_words("flow", data, *WORDS),
    ]
    result = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done at step 3") == 1
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert (tmp_path / WEIGHTS).read_bytes() == (own / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "run") == metrics(own / "run")
