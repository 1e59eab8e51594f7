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
DEEPSPEED = [BIN / "deepspeed", "--num_accelerators={processes}", "--master_port={port}"]
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node={processes}", "-m"],
    "deepspeed": [*DEEPSPEED, "--module"],
    "deepspeed --no_local_rank": [*DEEPSPEED, "--no_local_rank", "--module"],
}


@pytest.fixture(scope="module")
def own(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one and of two ranks that cosyexp started, 1/run and 2/run."""
    folder = tmp_path_factory.mktemp("own")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        words = train_words("flow", data, *WORDS, f"engine.nproc_per_node={processes}")
        command("train", *words, cwd=folder / str(processes))
    return folder


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [("torchrun", 1), ("torchrun", 2), ("deepspeed", 2), ("deepspeed --no_local_rank", 1)],
)
def test_ranks_of_another_launcher(launcher, processes, own, data, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *(str(word).format(port=port, processes=processes) for word in LAUNCHERS[launcher]),
        "cosyexp.train",
        *train_words("flow", data, *WORDS),
    ]
    result = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done at step 3") == 1
    logs = {path.name for path in (tmp_path / "run/logs").iterdir()}
    assert logs == {f"rank_{rank}.log" for rank in range(processes)}
    wanted = own / str(processes)
    assert (tmp_path / WEIGHTS).read_bytes() == (wanted / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "run") == metrics(wanted / "run")
