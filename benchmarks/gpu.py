"""Steps per second, throughput, share of the peak FLOPs and memory on one GPU, as one table.

Usage: python benchmarks/gpu.py [family] [precision] [frames,frames] [steps]

By default cosyvoice2 in bf16 with micro-batches of 2,000 and of 20,000 mel frames, plain and
compiled. The batches are random numbers of 10-second utterances, so data loading takes no part. On
a CPU it runs too, for a check: python benchmarks/gpu.py demo fp32 200 2
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.data.batch import Batch
from cosyexp.data.draws import Draws
from cosyexp.data.loader import MicroBatch
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.training.build import build_engine, build_objective
from cosyexp.training.trainer import Trainer

DEFAULTS = ["cosyvoice2", "bf16", "2000,20000", "20"]
MODELS = ("llm", "flow", "hifigan")
SECONDS, TEXT_PER_SECOND = 10, 4  # of an utterance; text tokens per second
WARM_UP = 3  # steps before the clock starts; the first ones compile
# dense FLOPs per second of half precision (https://www.nvidia.com/en-us/data-center/ data sheets)
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def random_rows(config: TrainConfig, frames: int) -> list[dict[str, np.ndarray]]:
    """Returns the fields of utterances that have so many mel frames in total."""
    family, draw = config.family, np.random.default_rng(0)
    per_second = family.sample_rate // family.mel.hop
    size = min(SECONDS * per_second, frames)
    tokens = size * family.token_rate // per_second
    seconds = size / per_second
    rows: list[dict[str, np.ndarray]] = []
    for _ in range(max(frames // size, 1)):
        speech = draw.integers(family.speech_vocabulary, size=(1, tokens))
        text = draw.integers(30, size=(1, max(int(seconds * TEXT_PER_SECOND), 1)))
        rows.append(
            {
                "text": text,
                "speech": speech,
                "token": speech,
                "speaker": draw.standard_normal((family.speaker_dim, 1)).astype(np.float32),
                "mel": draw.standard_normal((family.mel.bins, size)).astype(np.float32),
                "wave": draw.integers(-9999, 9999, size=(1, size * family.mel.hop)),
                "f0": draw.uniform(80, 300, size=(1, size)).astype(np.float32),
            }
        )
    return rows


def random_batch(config: TrainConfig, frames: int) -> Batch:
    """Returns a micro-batch of random utterances."""
    collator = build(config.model.collator, "collator")
    if config.model.name == "hifigan":  # its frames are those of the segments
        segments = max(frames // collator.frames, 1)
        rows = [random_rows(config, max(collator.frames, 2))[0] for _ in range(segments)]
    else:
        rows = random_rows(config, frames)
    names = collator.fields.keys()
    kept = [{name: row.get(name, np.zeros((1, 0), np.int64)) for name in names} for row in rows]
    batch: Batch = collator.collate([f"utt{i}" for i in range(len(rows))], kept, Draws(0, 0))
    return batch.pin_memory() if torch.cuda.is_available() else batch


def make_config(model: str, family: str, precision: str, compiled: bool) -> TrainConfig:
    """Returns the config of a training."""
    words = [f"family={family}", f"model={model}", f"trainer.precision={precision}"]
    # the tokenizer of a family may need a folder, and does not matter here
    words += ["tokenizer@family.tokenizer=characters", f"engine.compile={compiled}"]
    return compose_train(words)


def make_trainer(config: TrainConfig, folder: str) -> Trainer:
    """Returns a trainer without data, ready to step."""
    trainer = Trainer(
        objective=build_objective(config),
        engine=build_engine(config),
        loader=cast(Any, None),
        validation=None,
        preview=None,
        run=RunDirectory(folder),
        config=config.trainer,
        retention=config.checkpoint,
        seed=0,
        callbacks={},
        metrics={},
        loggers=(),
    )
    trainer.setup()
    return trainer


def wait() -> None:
    """Waits until the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(trainer: Trainer, batch: Batch, steps: int, compiled: bool) -> Mapping[str, float]:
    """Returns seconds per step, units per step, FLOPs per step (0 if compiled) and GB of memory."""
    micro, flops = [MicroBatch(0, batch)], 0
    for _ in range(WARM_UP):
        units = trainer.step(micro)
    if not compiled:
        with FlopCounterMode(display=False) as counter:
            trainer.step(micro)
        flops = counter.get_total_flops()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(micro)
    wait()
    seconds = (time.perf_counter() - start) / steps
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    unit = next(name for name in units if name != "utterances")
    return {"seconds": seconds, "units": units[unit], "flops": flops, "memory": memory}


def row(model: str, frames: int, compiled: bool, cells: list[str]) -> str:
    """Returns a line of the table."""
    kind = "compiled" if compiled else "plain"
    return f"{model:8} {frames:7} {kind:9}" + "".join(f" {cell:>10}" for cell in cells)


def main() -> None:
    """Prints the table."""
    family, precision, sizes, steps = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    print(f"{name}, torch {torch.__version__}, {family} in {precision}, {steps} steps each")
    print(f"{'model':8} {'frames':>7} {'':9}    steps/s    units/s    of peak         GB")
    for model, size, compiled in product(MODELS, sizes.split(","), (False, True)):
        torch.compiler.reset()
        config = make_config(model, family, precision, compiled)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(config, folder)
            try:
                batch = random_batch(config, int(size))
                found = measure(trainer, batch, int(steps), compiled)
            except torch.OutOfMemoryError:
                print(row(model, int(size), compiled, ["out of memory"]), flush=True)
                continue
            finally:
                trainer.engine.close()
                del trainer
        if not compiled:
            flops = found["flops"]  # compiled blocks do the same work
        share = f"{flops / found['seconds'] / peak:.1%}" if peak else "-"
        rates = [f"{1 / found['seconds']:.2f}", f"{found['units'] / found['seconds']:.0f}"]
        print(
            row(model, int(size), compiled, [*rates, share, f"{found['memory']:.1f}"]), flush=True
        )


if __name__ == "__main__":
    main()
