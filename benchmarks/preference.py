"""What a cached reference saves in preference training: the time of a step and the memory, on the demo llm and on a wider one.

    python benchmarks/preference.py [steps]

The steps with and without take turns within one process, and are timed by its CPU seconds; memory is that of processes of their own.
"""

import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cosyexp.registry import build
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.shards import read_list
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import save_tensors
from cosyexp.training import session
from cosyexp.training.reference import setup_reference
from cosyexp.training.trainer import Trainer

WIDE = (
    "network.text_width=512,network.text_encoder.width=768,network.text_encoder.heads=12,network.text_encoder.hidden=3072,"
    "network.llm.width=768,network.llm.heads=12,network.llm.hidden=3072"
)
SIZES = {"demo": [], "49 M": WIDE.split(",")}


def config_of(*words: str) -> Any:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR.resolve())):
        return OmegaConf.to_container(
            compose("train", ["model=llm", *words]), resolve=True, enum_to_str=True
        )


def make_pairs(folder: Path) -> None:
    """The demo dataset, with every answer's tokens in another order as what is to be rejected."""
    demo = config_of("data.corpus.minutes=4")
    prepare_corpus(demo["data"]["corpus"], demo["family"], folder / "pairs")
    draw = np.random.default_rng(0)
    for name in ("train", "valid"):
        for path in read_list(str(folder / f"pairs/{name}.list")):
            table = pq.read_table(path)
            rejected = [
                draw.permutation(answer).tolist() for answer in table["speech_token"].to_pylist()
            ]
            pq.write_table(
                table.append_column(
                    "reject_speech_token", pa.array(rejected, pa.list_(pa.int32()))
                ),
                path,
            )


def trainer_of(folder: Path, cached: bool, words: list[str]) -> Trainer:
    weights = folder / f"reference_{len(words)}.safetensors"
    given = [
        "mode=dpo",
        "data=prepared",
        f"data.dir={folder}/pairs",
        f"reference={weights}",
        f"objective.cache_reference={cached}",
    ]
    config = config_of(*given, *words)
    if not weights.exists():
        save_tensors(weights, build(config.network, "network").state_dict())
    directory, engine = RunDirectory(folder / f"run_{len(words)}_{cached}"), session._engine(config)
    datasets = session.datasets_of(config, engine)
    trainer = session._trainer(config, engine, directory, *datasets)
    setup_reference(trainer.objective, config, directory, datasets, engine)  # type: ignore[arg-type]
    engine.setup(trainer.objective.trainables, trainer.objective.frozen_modules)
    return trainer


def seconds(trainer: Trainer, block: Any) -> float:
    began = time.process_time()
    trainer.step(block)
    return time.process_time() - began


def megabytes(folder: Path, cached: bool, words: list[str]) -> float:
    """The most that a process of its own holds, while it takes three steps."""
    torch.set_num_threads(1)
    trainer = trainer_of(folder, cached, words)
    for _ in range(3):
        trainer.step(trainer.loader.next_step())
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    torch.set_num_threads(1)
    print(
        f"{'llm':6} {'ms live':>9} {'ms cached':>10} {'cached : live':>14} {'MB live':>9} {'MB cached':>10} {'MB of weights':>14}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pairs(folder)
        for size, words in SIZES.items():
            trainers = {cached: trainer_of(folder, cached, words) for cached in (False, True)}
            times = []
            for step in range(steps + 1):
                block = trainers[True].loader.next_step()
                pair = seconds(trainers[False], block), seconds(trainers[True], block)
                times += [pair] if step else []
            live, cached = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(ours / theirs for theirs, ours in times)
            module = trainers[True].objective.trainables["llm"].module
            weights = sum(parameter.nbytes for parameter in module.parameters()) / 1e6
            with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                memory = [
                    pool.apply(megabytes, (folder, cached, words)) for cached in (False, True)
                ]
            print(
                f"{size:6} {live:9.0f} {cached:10.0f} {ratio:14.3f} {memory[0]:9.0f} {memory[1]:10.0f} {weights:14.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
