"""Records the environment that a run was started in: command, code version, packages, hardware."""

import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("cosyexp", "torch", "numpy", "hydra-core", "safetensors", "pyarrow")


def describe() -> dict[str, Any]:
    """Returns the command, start time, git state of the code, package versions and hardware."""
    return {
        "argv": sys.argv,
        "folder": os.getcwd(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": {"sha": git("rev-parse", "HEAD"), "diff": git("diff", "HEAD")},
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in PACKAGES},
        },
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git(*words: str) -> str | None:
    """Returns the output of a git command in the folder of this code, or None if the command fails.

    It fails if git is not installed or the code is not in a git checkout.
    """
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def installed(package: str) -> str | None:
    """Returns the installed version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
