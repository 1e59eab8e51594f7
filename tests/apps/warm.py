"""Runs apps without a cold start: in forks of a process that has imported the heavy packages.

`python -m tests.apps.warm` reads JSON lines {module, words, cwd, seconds, out, err, env} and
answers each with an exit status. A fork runs what `python -m <module> <words>` runs.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from cosyexp.cli.compose import compose
from cosyexp.exporting.onnx import quiet
from tests.support import ROOT, environment

HEAVY = (
    "cosyexp.averaging.write",
    "cosyexp.evaluation.report",
    "cosyexp.exporting.export",
    "cosyexp.objectives.adversarial",
    "cosyexp.objectives.flow",
    "cosyexp.objectives.language",
    "cosyexp.preferences.write",
    "cosyexp.synthesis.pipeline",
    "cosyexp.training.engines.ddp",
    "cosyexp.training.build",
    "hydra._internal.hydra",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
    "peft",
    "tensorboard.plugins.hparams.summary_v2",
    "torch._dynamo",
    "torch.onnx",
    "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
)


class Warm:
    """`warm("train", "model=flow", cwd=...)` is `support.command` without the imports."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def __call__(
        self,
        app: str,
        *words: str,
        cwd: Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        result = self.module(f"cosyexp.{app}", *words, cwd=cwd, env=env)
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    def module(
        self,
        name: str,
        *words: object,
        cwd: Path,
        seconds: int = 300,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin and self.server.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order: dict[str, Any] = {
                "module": name,
                "words": list(map(str, words)),
                "cwd": str(cwd),
                "seconds": seconds,
                "out": str(out),
                "err": str(err),
                "env": dict(env or {}),
            }
            self.server.stdin.write(json.dumps(order) + "\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(
                order["words"], status, out.read_text(), err.read_text()
            )


@contextmanager
def warm_process() -> Iterator[Warm]:
    command = [sys.executable, "-m", "tests.apps.warm"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Warm(server)


def run(order: dict[str, Any]) -> None:
    """Runs a module in this fork; what it raises ends the fork."""
    signal.alarm(order["seconds"])
    os.chdir(order["cwd"])
    os.environ |= order["env"]
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.argv = [order["module"], *order["words"]]
    status: object = 0
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
    end_now(status)


def end_now(status: object) -> NoReturn:
    """Ends this process as Python does, but without freeing its objects, which takes long."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0) if isinstance(status, int | None) else 1)


def serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    tqdm.monitor_interval = 0  # its thread would not survive a fork
    with quiet():  # the first export imports a thousand modules
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), dynamo=True, verbose=False)
    compose("train", [])  # fills the caches of Hydra's parser and plugins
    gc.freeze()
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
