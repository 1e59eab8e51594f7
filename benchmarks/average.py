"""Time and memory of averaging checkpoints, against reading the files once, and against summing what torch.load gives.

    python benchmarks/average.py [megabytes of a file] [files]

Each way runs in a process of its own; memory is the peak above what it had before. Cold: the files are not in the system's cache.
"""

import multiprocessing as mp
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cosyexp.averaging.mean import combine
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.tensors import save_tensors

TENSORS = 16


def read_once(files: Sequence[Path], _: Path) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as content:
            while content.read(1 << 18):
                pass


def average(files: Sequence[Path], out: Path) -> None:
    combine(
        [(file, 1.0) for file in files], len(files), files[-1], out, pickled=out.suffix == ".pt"
    )


def checked(files: Sequence[Path], out: Path) -> None:
    """As the command does it: the hashes of the files before, that of the average after."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(file_hash, files))
    average(files, out)
    file_hash(out)


def torch_load(files: Sequence[Path], out: Path) -> None:
    total = torch.load(files[0], map_location="cpu")
    for file in files[1:]:
        for name, tensor in torch.load(file, map_location="cpu").items():
            total[name] += tensor
    torch.save({name: tensor / len(files) for name, tensor in total.items()}, out)


def peak() -> float:
    """Megabytes; ru_maxrss would start from the parent's."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def measured(
    work: Callable[..., None], files: Sequence[Path], out: Path, small: Path, cold: bool, queue: Any
) -> None:
    work([small] * 2, out)  # the code's own pages
    for file in files if cold else ():
        with open(file, "rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, began = peak(), time.perf_counter()
    work(files, out)
    queue.put((time.perf_counter() - began, peak() - before))


def main() -> None:
    size, count = (int(word) for word in [*sys.argv[1:], "1200", "5"][:2] if word)
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), {}
        for suffix, ways in (
            (".safetensors", (read_once, average, checked)),
            (".pt", (average, torch_load)),
        ):
            files = [folder / f"{i}{suffix}" for i in range(count)]
            small = folder / f"small{suffix}"
            save: Callable[..., None] = (
                save_tensors
                if suffix == ".safetensors"
                else lambda path, tensors: torch.save(tensors, path)
            )
            save(small, {f"t{i}": torch.randn(4) for i in range(TENSORS)})
            for file in files:
                save(file, {f"t{i}": torch.randn(size * 2**18 // TENSORS) for i in range(TENSORS)})
            for way in ways:
                for uncached in (True, False):
                    queue = mp.get_context("spawn").SimpleQueue()
                    words = (way, files, folder / f"out{suffix}", small, uncached, queue)
                    child = mp.get_context("spawn").Process(target=measured, args=words)
                    child.start()
                    results[f"{way.__name__} {suffix}", uncached] = queue.get()
                    child.join()
            for file in files:
                file.unlink()
        print(f"{count} files of {size} MB, largest tensor {size / TENSORS:.0f} MB")
        print(f"{'way':24} {'cold: reading once':>20} {'warm: reading once':>20} {'extra MB':>9}")
        once = [results["read_once .safetensors", uncached][0] for uncached in (True, False)]
        for name in dict.fromkeys(name for name, _ in results):
            (cold, _), (warm, extra) = results[name, True], results[name, False]
            print(f"{name:24} {cold / once[0]:20.2f} {warm / once[1]:20.2f} {extra:9.1f}")
        print(
            f"reading once: {size * count / once[0] / 1000:.1f} GB/s cold, {size * count / once[1] / 1000:.1f} GB/s warm"
        )


if __name__ == "__main__":
    main()
