"""What a step takes under each engine, against ddp in one process.

    python benchmarks/engines.py [words of cosyexp.train, such as data.dir=...]

Every step has two micro-batches, on one rank or on two. Each engine runs in processes of its own; memory is the peak of the largest
of them above what it had before the network was made (on CUDA: the peak of what was allocated). Prints ratios within this run.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.run.directory import RunDirectory
from cosyexp.training import session
from cosyexp.training.launch import launch

STEPS = 4
WORK = {
    "demo llm": ["model=llm"],
    "llm of 50 M": [
        "model=llm",
        *(f"network.llm.{size}" for size in ("width=768", "hidden=3072", "heads=12", "blocks=7")),
        "data.max_frames=300",
    ],
}
ENGINES = {
    "ddp": ["engine=ddp"],
    "deepspeed, stage 1": ["engine=deepspeed", "engine.stage=1"],
    "deepspeed, stage 2": ["engine=deepspeed", "engine.stage=2"],
    "deepspeed, stage 3": ["engine=deepspeed", "engine.stage=3"],
    "fsdp": ["engine=fsdp"],
    "fsdp, recompute": ["engine=fsdp", "engine.activation_checkpointing=true"],
}
ONE, TWO = (
    ["engine.nproc_per_node=1", "trainer.accumulate=2"],
    ["engine.nproc_per_node=2", "trainer.accumulate=1"],
)


def megabytes(cuda: bool) -> float:
    return (
        torch.cuda.max_memory_allocated() / 2**20
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )


def measure(config: Mapping[str, Any]) -> tuple[float, float, int]:
    """Seconds of a step (the median), the largest peak of memory in MB, and the number of weights; runs in every rank."""
    engine = session._engine(config)
    trainer = session._trainer(
        config, engine, RunDirectory(config["run_dir"]), *session.datasets_of(config, engine)
    )
    size = sum(
        parameter.numel()
        for trainable in trainer.objective.trainables.values()
        for parameter in trainable.module.parameters()
    )
    cuda, seconds = engine.device.type == "cuda", []
    before = megabytes(cuda) - size * 4 / 2**20  # the network is there already
    engine.setup(trainer.objective.trainables, trainer.objective.frozen_modules)
    for _ in range(STEPS + 1):
        micro_batches, began = trainer.loader.next_step(), time.perf_counter()
        trainer.step(micro_batches)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = max(engine.all_gather(megabytes(cuda) - before))
    engine.close()
    return statistics.median(seconds[1:]), peak, size


def config_of(folder: str, *words: str) -> dict[str, Any]:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR.resolve())):
        composed = compose("train", [f"run_dir={folder}", *words])
    config: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    return config


def apart(config: Mapping[str, Any], pipe: int) -> None:
    """In a process of its own, as peaks do not fall again."""
    found = launch(measure, config)
    os.write(pipe, " ".join(map(str, found)).encode())


def main() -> None:
    print(f"{'work':14} {'engine':22} {'ranks':>5} {'ms':>8} {'time':>6} {'MB':>7} {'memory':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for work, words in WORK.items():
            first: tuple[float, float] | None = None
            for ranks, division in ((1, ONE), (2, TWO)):
                for engine, chosen in ENGINES.items():
                    if ranks == 1 and engine != "ddp":
                        continue
                    config = config_of(folder, *words, *chosen, *division, *sys.argv[1:])
                    reading, writing = os.pipe()
                    if (pid := os.fork()) == 0:
                        apart(config, writing)
                        os._exit(0)
                    os.close(writing)
                    os.waitpid(pid, 0)
                    seconds, peak, size = (float(word) for word in os.read(reading, 1000).split())
                    first = first or (seconds, peak)
                    title = f"{work:14} {engine:22} {ranks:5}"
                    print(
                        f"{title} {1000 * seconds:8.0f} {seconds / first[0]:6.2f} {peak:7.0f} {peak / first[1]:7.2f}",
                        flush=True,
                    )
            print(f"{'':14} {size / 1e6:.1f} M weights")


if __name__ == "__main__":
    main()
