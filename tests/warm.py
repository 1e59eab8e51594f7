"""Runs modules in forks of a process that has imported the heavy packages already: a start costs a fraction of a second.

`python -m tests.warm` reads JSON lines {module, words, cwd, seconds, out, err} and answers each with an exit status. What runs in the fork
is what `python -m <module> <words>` runs, in a process of its own.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HEAVY = (
    "cosyexp.training.session", "cosyexp.training.engines.ddp", "cosyexp.synthesis.pipeline", "cosyexp.exporting.export",
    "cosyexp.averaging.write", "cosyexp.objectives.adversarial", "cosyexp.objectives.language", "cosyexp.objectives.flow",
    "torch.utils.tensorboard", "hydra._internal.hydra", "hydra.core.override_parser.overrides_parser", "torch.onnx",
)


class Warm:
    """Such a process, and what it is asked for."""

    def __init__(self, env: dict[str, str]) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], cwd=Path(__file__).parents[1], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, module: str, *words: str, cwd: Path, seconds: int = 300) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin and self.server.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = {"module": module, "words": words, "cwd": str(cwd), "seconds": seconds, "out": str(out), "err": str(err)}
            self.server.stdin.write(json.dumps(order) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess([module, *words], code, out.read_text(), err.read_text())

    def close(self) -> None:
        self.server.communicate()


def child(order: dict[str, Any]) -> None:
    signal.alarm(order["seconds"])
    os.chdir(order["cwd"])
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, order["out"], os.O_CREAT | os.O_WRONLY), (2, order["err"], os.O_CREAT | os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_APPEND), number)
    sys.stdin = open(0)
    sys.argv = ["", *order["words"]]
    sys.path[0] = order["cwd"]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


def serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
