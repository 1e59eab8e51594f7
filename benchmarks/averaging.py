"""Time and memory of averaging checkpoints, against reading the files once and against loading them all.

    python benchmarks/averaging.py [megabytes of a file] [files]

Each way runs in a process of its own; memory is what it needed above the imports.
"""

import multiprocessing as mp
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cosyexp.averaging.mean import average
from cosyexp.run.tensors import read_tensors, save_tensors

TENSORS = 16


def read_once(files: Sequence[Path], _: Path) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as content:
            while content.read(1 << 22):
                pass


def load_all(files: Sequence[Path], out: Path) -> None:
    loaded = [read_tensors(file) for file in files]
    save_tensors(out, {name: torch.stack([tensors[name] for tensors in loaded]).mean(0) for name in loaded[0]})


def measured(work: Callable[..., None], files: Sequence[Path], out: Path, queue: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    work(files, out)
    queue.put((time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    size, count = (int(word) for word in [*sys.argv[1:], "256", "5"][:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{i}.safetensors" for i in range(count)]
        for file in files:
            save_tensors(file, {f"t{i}": torch.randn(size * 2**18 // TENSORS) for i in range(TENSORS)})
        results = {}
        for work in (read_once, average, load_all):
            queue = mp.get_context("spawn").SimpleQueue()
            child = mp.get_context("spawn").Process(target=measured, args=(work, files, folder / "out.safetensors", queue))
            child.start()
            results[work.__name__] = queue.get()
            child.join()
        print(f"{count} files of {size} MB, largest tensor {size / TENSORS:.0f} MB")
        print(f"{'way':10} {'time : reading once':>20} {'extra MB':>9}")
        for way, (seconds, extra) in results.items():
            print(f"{way:10} {seconds / results['read_once'][0]:20.2f} {extra:9.0f}")


if __name__ == "__main__":
    main()
