"""What a cached reference saves in preference training, on the demo llm and on a wider one.

Usage: python benchmarks/preference.py [steps]

Steps with and without the cache alternate in one process, and are timed by its CPU seconds. Memory
is measured in processes of their own.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cosyexp.cli.compose import compose_train
from cosyexp.data.loader import MicroBatch
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.shards import read_list
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import save_tensors
from cosyexp.training.build import assemble, build_engine
from cosyexp.training.trainer import Trainer

SIZES = {
    "demo": [],
    "49 M": [
        "network.text_width=512",
        *(
            f"network.{part}.{size}"
            for part in ("text_encoder", "llm")
            for size in ("width=768", "heads=12", "hidden=3072")
        ),
    ],
}


def make_pairs(folder: Path) -> None:
    """Prepares the demo corpus; the rejected answer is a permutation of the speech tokens."""
    demo = compose_train(["model=llm", "data.corpus.minutes=4"])
    prepare_corpus(demo.data.corpus, demo.family, folder / "pairs")
    rng = np.random.default_rng(0)
    for name in ("train", "valid"):
        for path in read_list(str(folder / f"pairs/{name}.list")):
            table = pq.read_table(path)
            tokens = table["speech_token"].to_pylist()
            rejected = [rng.permutation(answer).tolist() for answer in tokens]
            column = pa.array(rejected, pa.list_(pa.int32()))
            pq.write_table(table.append_column("reject_speech_token", column), path)


def make_trainer(folder: Path, cached: bool, words: Sequence[str]) -> Trainer:
    """Returns a trainer in memory, whose reference has random weights.

    Args:
        folder: of the data, the reference and the run.
        cached: whether the reference is cached.
        words: overrides that set the size of the llm.
    """
    reference = folder / f"reference_{len(words)}.safetensors"
    run = RunDirectory(folder / f"run_{len(words)}_{cached}")
    settings = [
        "model=llm",
        "mode=dpo",
        "data=prepared",
        f"data.dir={folder}/pairs",
        f"reference={reference}",
        f"objective.cache_reference={cached}",
        f"run_dir={run.path}",
    ]
    config = compose_train([*settings, *words])
    if not reference.exists():
        save_tensors(reference, build(config.network, "network").state_dict())
    trainer = assemble(config, run, build_engine(config))
    trainer.setup()
    return trainer


def seconds(trainer: Trainer, block: Sequence[MicroBatch]) -> float:
    """Returns the CPU time of a step."""
    start = time.process_time()
    trainer.step(block)
    return time.process_time() - start


def megabytes(folder: Path, cached: bool, words: Sequence[str]) -> float:
    """Returns the peak memory of this process after three steps."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, cached, words)
    for _ in range(3):
        trainer.step(trainer.loader.next_step())
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Prints the table."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    torch.set_num_threads(1)
    times_title = f"{'ms live':>9} {'ms cached':>10} {'cached : live':>14}"
    print(f"{'llm':6} {times_title} {'MB live':>9} {'MB cached':>10} {'MB of weights':>14}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pairs(folder)
        for size, words in SIZES.items():
            trainers = {cached: make_trainer(folder, cached, words) for cached in (False, True)}
            times = []
            for step in range(steps + 1):
                block = trainers[True].loader.next_step()
                pair = seconds(trainers[False], block), seconds(trainers[True], block)
                times += [pair] if step else []  # the first one warms up
            live, cached = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(ours / theirs for theirs, ours in times)
            module = trainers[True].objective.trainables["llm"].module
            weights = sum(parameter.nbytes for parameter in module.parameters()) / 1e6
            peaks = []
            for choice in (False, True):
                with get_context("spawn").Pool(1) as pool:
                    peaks.append(pool.apply(megabytes, (folder, choice, words)))
            times_row = f"{live:9.0f} {cached:10.0f} {ratio:14.3f}"
            memory = f"{peaks[0]:9.0f} {peaks[1]:10.0f} {weights:14.0f}"
            print(f"{size:6} {times_row} {memory}", flush=True)


if __name__ == "__main__":
    main()
