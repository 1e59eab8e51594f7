"""Time and memory of averaging checkpoints, compared with reading the files once.

Usage: python benchmarks/average.py [megabytes of a file] [number of files]

Each method runs in a process of its own. Memory is the peak above what the process had before.
"Cold" means that the files are not in the page cache.
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

TENSORS = 16  # in a file
Method = Callable[[Sequence[Path], Path], None]  # of the files and the output


def read_once(files: Sequence[Path], _: Path) -> None:
    """Reads all files."""
    for file in files:
        with open(file, "rb", buffering=0) as content:
            while content.read(1 << 18):
                pass


def average(files: Sequence[Path], out: Path) -> None:
    """Averages the files as cosyexp does, without checksums."""
    parts = [(file, 1.0) for file in files]
    combine(parts, len(files), files[-1], out, pickled=out.suffix == ".pt")


def checked(files: Sequence[Path], out: Path) -> None:
    """Averages as `cosyexp.average` does, with the checksums of all files."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(file_hash, files))
    average(files, out)
    file_hash(out)


def torch_load(files: Sequence[Path], out: Path) -> None:
    """Adds up what torch.load returns."""
    total = torch.load(files[0], map_location="cpu")
    for file in files[1:]:
        for name, tensor in torch.load(file, map_location="cpu").items():
            total[name] += tensor
    torch.save({name: tensor / len(files) for name, tensor in total.items()}, out)


def peak() -> float:
    """Returns the peak memory of this process in MB; ru_maxrss would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024  # type: ignore[index]


def measure(
    method: Method, files: Sequence[Path], out: Path, small: Path, cold: bool, queue: Any
) -> None:
    """Puts the seconds and the MB of a method into a queue.

    Args:
        method: what is measured.
        files: its input.
        out: its output.
        small: a small file of the same format, to load the code of the method first.
        cold: drop the files from the page cache first.
        queue: of the results.
    """
    method([small] * 2, out)
    for file in files if cold else ():
        with open(file, "rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = peak(), time.perf_counter()
    method(files, out)
    queue.put((time.perf_counter() - start, peak() - before))


def save(path: Path, megabytes: float) -> None:
    """Writes a file of random weights."""
    count = int(megabytes * 2**18) // TENSORS
    tensors = {f"t{i}": torch.randn(count) for i in range(TENSORS)}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_tensors(path, tensors)


def main() -> None:
    """Prints the table."""
    arguments = [int(word) for word in sys.argv[1:]]
    size, count = [*arguments, *(1200, 5)[len(arguments) :]]
    methods: dict[str, Sequence[Method]] = {
        ".safetensors": (read_once, average, checked),
        ".pt": (average, torch_load),
    }
    context, results = mp.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for suffix, chosen in methods.items():
            files = [folder / f"{i}{suffix}" for i in range(count)]
            small, out = folder / f"small{suffix}", folder / f"out{suffix}"
            save(small, TENSORS / 2**16)  # 4 numbers in a tensor
            for file in files:
                save(file, size)
            for method in chosen:
                for cold in (True, False):
                    queue = context.SimpleQueue()
                    arguments_of_child = (method, files, out, small, cold, queue)
                    child = context.Process(target=measure, args=arguments_of_child)
                    child.start()
                    results[f"{method.__name__} {suffix}", cold] = queue.get()
                    child.join()
            for file in files:
                file.unlink()
    print(f"{count} files of {size} MB, largest tensor {size / TENSORS:.0f} MB")
    print(f"{'way':24} {'cold: reading once':>20} {'warm: reading once':>20} {'extra MB':>9}")
    cold_once, warm_once = (results["read_once .safetensors", cold][0] for cold in (True, False))
    for name in dict.fromkeys(name for name, _ in results):
        (seconds, _), (warm_seconds, extra) = results[name, True], results[name, False]
        ratios = f"{seconds / cold_once:20.2f} {warm_seconds / warm_once:20.2f}"
        print(f"{name:24} {ratios} {extra:9.1f}")
    gigabytes = size * count / 1000
    cold_speed, warm_speed = gigabytes / cold_once, gigabytes / warm_once
    print(f"reading once: {cold_speed:.1f} GB/s cold, {warm_speed:.1f} GB/s warm")


if __name__ == "__main__":
    main()
