"""How fast batches are made, against a plain loop that computes everything of every utterance each time, and what a large dataset costs.

    python benchmarks/data.py [utterances of the index]

The plain loop does what the original's pipeline does for one utterance: reads its row, decodes, resamples, computes mel (and, for the
vocoder, F0 of a crop). Both are timed by CPU seconds of one thread within this run; the caches of ours are there already.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from cosyexp.registry import build
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.data import index
from cosyexp.data.cache import cache_path, fingerprint
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import Draws
from cosyexp.data.features import pitch, read_wave
from cosyexp.data.fields import spectrogram
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.sampler import BatchSampler
from cosyexp.data.shards import COLUMNS, read_list, read_rows, write_list

SECONDS = 4.0  # of each side
SHARD = 1000  # utterances of a synthetic shard


def config_of(model: str) -> Any:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR.resolve())):
        composed = compose("train", [f"model={model}", "data.corpus.minutes=5"])
    return OmegaConf.to_container(composed, resolve=True, enum_to_str=True)


def plain(model: str, config: Any, shards: list[Path]) -> Iterator[None]:
    """One utterance a turn, everything computed."""
    family, tokenizer, collator = (
        config["family"],
        build(config.family.tokenizer, "tokenizer"),
        build(config.model.collator, "collator"),
    )
    mel = build(config_of("flow").model.collator, "collator").fields["mel"]
    while True:
        for row in (row for shard in shards for row in read_rows(shard, COLUMNS.names)):
            tokenizer.encode(row["text"])
            wave = read_wave(row["audio_data"], family["sample_rate"])
            if model == "hifigan":
                wave = wave[: collator.frames * collator.hop]
            if len(wave) >= mel.n_fft:
                spectrogram(mel)(torch.from_numpy(wave)[None])
            if model == "hifigan":
                pitch(wave, family["sample_rate"], collator.hop, "harvest")
            torch.tensor(row["speech_token"]), torch.tensor(row["utt_embedding"])
            yield


def ours(config: Any, dataset: Dataset) -> Iterator[int]:
    """One batch a turn; how many utterances it has."""
    sampler = BatchSampler(lengths=dataset.lengths, budget=config["data"]["max_frames"], seed=0)
    for epoch in range(1_000_000):
        for rows in sampler.epoch(epoch, 1):
            dataset.batch(rows.tolist(), Draws(0, epoch))
            yield len(rows)


def rate(turns: Iterator[int | None]) -> float:
    """Utterances per CPU second."""
    next(turns)
    began, count = time.process_time(), 0
    while time.process_time() - began < SECONDS:
        count += next(turns) or 1
    return count / (time.process_time() - began)


def compare_views(folder: Path) -> None:
    print(f"{'view':8} {'plain loop/s':>13} {'ours/s':>9} {'ratio':>7}")
    for model in ("llm", "flow", "hifigan"):
        config = config_of(model)
        prepare_corpus(config["data"]["corpus"], config["family"], folder)
        lists = [str(folder / "train.list")]
        dataset = Dataset(lists, build(config.model.collator, "collator"), max_bad=0, processes=1)
        slow, fast = rate(plain(model, config, read_list(lists[0]))), rate(ours(config, dataset))
        print(f"{model:8} {slow:13.1f} {fast:9.0f} {fast / slow:7.0f}", flush=True)


def useful_share() -> None:
    lengths = (
        np.random.default_rng(0).lognormal(np.log(500), 0.6, 100_000).clip(60, 3000).astype(int)
    )
    print("\nframes of a batch: share that is no padding, 100,000 utterances of 60 to 3000 frames")
    for budget in (2000, 20000):
        print(
            f"{budget:8} {1 - BatchSampler(lengths=np.minimum(lengths, budget), budget=budget, seed=0).padding():.3f}"
        )


def large_dataset(folder: Path, utterances: int) -> None:
    """The index of a dataset whose shards and fields are empty files: what a start reads, and the plan of its first epoch."""
    collator, draw, shards = (
        build(config_of("flow").model.collator, "collator"),
        np.random.default_rng(0),
        [],
    )
    for number in range(utterances // SHARD):
        shard = folder / f"{number:06d}.parquet"
        shard.parent.mkdir(parents=True, exist_ok=True)
        shard.write_bytes(number.to_bytes(8, "little"))
        frames = draw.lognormal(np.log(500), 0.6, SHARD).clip(60, 3000).astype(np.int32)
        sizes = {"token": frames, "speaker": np.ones_like(frames), "mel": frames}
        columns = {
            "key": draw.integers(2**63, size=SHARD, dtype=np.uint64),
            "good": np.ones(SHARD, bool),
            "faulty": np.zeros(SHARD, bool),
        }
        table = pa.table(columns | {f"size_{name}": sizes[name] for name in collator.fields})
        table = table.replace_schema_metadata({"shard": fingerprint(shard)})
        path = index.index_path(shard, collator.fields)
        path.parent.mkdir()
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        for field in collator.fields.values():
            cache_path(shard, field).touch()
        shards.append(shard)
    write_list(folder / "large.list", shards)
    before = memory()
    began = time.process_time()
    dataset = Dataset([str(folder / "large.list")], collator, max_bad=0, processes=1)
    opened = time.process_time() - began
    batches = BatchSampler(lengths=dataset.lengths, budget=2000, seed=0).epoch(0, 8)
    planned = time.process_time() - began - opened
    print(
        f"\n{len(dataset):,} utterances in {len(shards):,} shards: opened in {opened:.1f} s; an epoch of {len(batches):,} batches"
    )
    print(f"planned in {planned:.1f} s; {memory() - before:.0f} MB held")


def memory() -> float:
    """MB that this process holds."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        compare_views(Path(name) / "demo")
        useful_share()
        large_dataset(Path(name) / "large", int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)


if __name__ == "__main__":
    main()
