"""What the tests of this folder compare: the weights and the steps of a run's checkpoints."""

import hashlib
from pathlib import Path


def hashes(run: Path, step: int) -> dict[str, str]:
    """Returns the checksums of the files of weights in the checkpoint of a step."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def newest(run: Path) -> int:
    """Returns the step of the newest checkpoint, or -1 if there is none."""
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_????????")]
    return max(steps, default=-1)
