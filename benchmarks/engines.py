"""Time and memory of a step under each engine, compared with ddp in one process.

Usage: python benchmarks/engines.py [overrides of cosyexp.train, such as data.dir=...]

Every step has two micro-batches, on one rank or on two. Each engine runs in processes of its own.
Memory is the peak of the rank that takes most, above what it had before the network was made; on
CUDA it is the peak of what was allocated. The table has ratios too.
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig, engine_config
from cosyexp.run.directory import RunDirectory
from cosyexp.training.build import assemble, build_engine
from cosyexp.training.launch import launch

STEPS = 4
MODELS = {
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
    "fsdp, activation checkpointing": ["engine=fsdp", "engine.activation_checkpointing=true"],
}
CASES = [(1, "ddp"), *((2, engine) for engine in ENGINES)]  # ranks and engine


class Measurement(NamedTuple):
    """seconds: of a step, the median. megabytes: the peak. parameters: of the model."""

    seconds: float
    megabytes: float
    parameters: int


def peak_megabytes(cuda: bool) -> float:
    """Returns the peak memory of this process, or of its GPU."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(config: TrainConfig) -> Measurement:
    """Takes some steps; runs in every rank."""
    engine = build_engine(config)
    trainer = assemble(config, RunDirectory(config.run_dir), engine)
    trainables = trainer.objective.trainables.values()
    parameters = sum(
        parameter.numel() for trainable in trainables for parameter in trainable.module.parameters()
    )
    cuda, seconds = engine.device.type == "cuda", []
    before = peak_megabytes(cuda) - parameters * 4 / 2**20  # the network exists already
    trainer.setup()
    for _ in range(STEPS + 1):
        micro_batches, start = trainer.loader.next_step(), time.perf_counter()
        trainer.step(micro_batches)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = max(engine.all_gather(peak_megabytes(cuda) - before))
    engine.close()
    return Measurement(statistics.median(seconds[1:]), peak, parameters)


def launch_measure(config: TrainConfig) -> Measurement:
    """Measures in as many ranks as the config has."""
    return launch(measure, config, engine_config(config.engine))


def main() -> None:
    """Prints the table."""
    title = f"{'model':14} {'engine':30} {'ranks':>5}"
    print(f"{title} {'ms':>8} {'time':>6} {'MB':>7} {'memory':>7}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for model, words in MODELS.items():
            first: Measurement | None = None
            for ranks, engine in CASES:
                division = [f"engine.nproc_per_node={ranks}", f"trainer.accumulate={2 // ranks}"]
                given = [*words, *ENGINES[engine], *division, f"run_dir={folder}", *sys.argv[1:]]
                # a new process each time, as a peak never falls
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    found = pool.submit(launch_measure, compose_train(given)).result()
                first = first or found
                time_ratio = found.seconds / first.seconds
                memory_ratio = found.megabytes / first.megabytes
                numbers = f"{1000 * found.seconds:8.0f} {time_ratio:6.2f}"
                memory = f"{found.megabytes:7.0f} {memory_ratio:7.2f}"
                print(f"{model:14} {engine:30} {ranks:5} {numbers} {memory}", flush=True)
            assert first is not None
            print(f"{'':14} {first.parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
