"""How fast batches are made, compared with a plain loop, and what a large dataset costs.

Usage: python benchmarks/data.py [utterances of the large dataset]

The plain loop does what the original's pipeline does for each utterance: it reads the row, decodes
and resamples the audio, and computes the mel spectrogram (and, for the vocoder, F0 of a segment).
Both are timed by CPU seconds of one thread; our caches exist already.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.data import index
from cosyexp.data.cache import cache_path
from cosyexp.data.collators.base import Collator
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import Draws
from cosyexp.data.features import pitch, read_wave
from cosyexp.data.fields import Mel, spectrogram
from cosyexp.data.fingerprint import fingerprint
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.sampler import BatchSampler
from cosyexp.data.shards import COLUMNS, read_list, read_rows, write_list
from cosyexp.registry import build

SECONDS = 4.0  # for which each side is timed
SHARD = 1000  # utterances of a shard of the large dataset


def config_of(model: str) -> TrainConfig:
    """Returns the config of a demo model."""
    return compose_train([f"model={model}", "data.corpus.minutes=5"])


def collator_of(model: str) -> Any:
    """Returns the collator of a demo model."""
    return build(config_of(model).model.collator, "collator")


def random_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns lengths of utterances, 60 to 3000 frames."""
    return rng.lognormal(np.log(500), 0.6, count).clip(60, 3000).astype(np.int32)


def plain_loop(model: str, config: TrainConfig, shards: Sequence[Path]) -> Iterator[int]:
    """Computes everything for each utterance; yields the number of utterances, which is 1."""
    family, collator = config.family, build(config.model.collator, "collator")
    tokenizer = build(family.tokenizer, "tokenizer")
    mel = collator_of("flow").fields["mel"]
    assert isinstance(mel, Mel)
    while True:
        for row in (row for shard in shards for row in read_rows(shard, COLUMNS.names)):
            tokenizer.encode(row["text"])
            wave = read_wave(row["audio_data"], family.sample_rate)
            if model == "hifigan":
                wave = wave[: collator.frames * collator.hop]
            if len(wave) >= mel.n_fft:
                spectrogram(mel)(torch.from_numpy(wave)[None])
            if model == "hifigan":
                pitch(wave, family.sample_rate, collator.hop, "harvest")
            torch.tensor(row["speech_token"])
            torch.tensor(row["utt_embedding"])
            yield 1


def cached_batches(config: TrainConfig, dataset: Dataset) -> Iterator[int]:
    """Makes batches as in training; yields the number of utterances of each."""
    sampler = BatchSampler(lengths=dataset.lengths, budget=config.data.max_frames, seed=0)
    for epoch in range(1_000_000):
        for rows in sampler.epoch(epoch, 1):
            dataset.batch(rows.tolist(), Draws(0, epoch))
            yield len(rows)


def rate(counts: Iterator[int]) -> float:
    """Returns the utterances per CPU second."""
    next(counts)
    start, total = time.process_time(), 0
    while time.process_time() - start < SECONDS:
        total += next(counts)
    return total / (time.process_time() - start)


def compare_collators(folder: Path) -> None:
    """Prints the speed of each model's batches, on the demo corpus."""
    print(f"{'collator':8} {'plain loop/s':>13} {'cosyexp/s':>9} {'ratio':>7}")
    for model in ("llm", "flow", "hifigan"):
        config = config_of(model)
        prepare_corpus(config.data.corpus, config.family, folder)
        lists = [str(folder / "train.list")]
        dataset = Dataset(lists, collator_of(model), max_bad=0, processes=1)
        slow = rate(plain_loop(model, config, read_list(lists[0])))
        fast = rate(cached_batches(config, dataset))
        print(f"{model:8} {slow:13.1f} {fast:9.0f} {fast / slow:7.0f}", flush=True)


def useful_share() -> None:
    """Prints the share of a batch that is not padding."""
    lengths = random_lengths(np.random.default_rng(0), 100_000).astype(int)
    print("\nframes per batch: share without padding, 100,000 utterances of 60 to 3000 frames")
    for budget in (2000, 20000):
        sampler = BatchSampler(lengths=np.minimum(lengths, budget), budget=budget, seed=0)
        print(f"{budget:8} {1 - sampler.padding():.3f}")


def write_shard_index(shard: Path, collator: Collator, rng: np.random.Generator) -> None:
    """Writes an empty shard, empty caches, and an index of random lengths."""
    frames = random_lengths(rng, SHARD)
    sizes = {"token": frames, "speaker": np.ones_like(frames), "mel": frames}
    columns = {
        "key": rng.integers(2**63, size=SHARD, dtype=np.uint64),
        "good": np.ones(SHARD, bool),
        "faulty": np.zeros(SHARD, bool),
        **{f"size_{name}": sizes[name] for name in collator.fields},
    }
    table = pa.table(columns).replace_schema_metadata({"shard": fingerprint(shard)})
    path = index.index_path(shard, collator.fields)
    path.parent.mkdir()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for field in collator.fields.values():
        cache_path(shard, field).touch()


def large_dataset(folder: Path, utterances: int) -> None:
    """Prints the cost of opening a dataset and of planning its first epoch.

    Its shards and caches are empty files, as only their index is read for that.
    """
    collator, rng = collator_of("flow"), np.random.default_rng(0)
    folder.mkdir()
    shards = [folder / f"{number:06d}.parquet" for number in range(utterances // SHARD)]
    for number, shard in enumerate(shards):
        shard.write_bytes(number.to_bytes(8, "little"))
        write_shard_index(shard, collator, rng)
    write_list(folder / "large.list", shards)
    before, start = megabytes(), time.process_time()
    dataset = Dataset([str(folder / "large.list")], collator, max_bad=0, processes=1)
    opened = time.process_time() - start
    batches = BatchSampler(lengths=dataset.lengths, budget=2000, seed=0).epoch(0, 8)
    planned = time.process_time() - start - opened
    size = f"{len(dataset):,} utterances in {len(shards):,} shards"
    print(f"\n{size}: opened in {opened:.1f} s; an epoch of {len(batches):,} batches")
    print(f"planned in {planned:.1f} s; {megabytes() - before:.0f} MB held")


def megabytes() -> float:
    """Returns the memory that this process holds, in MB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    """Prints all tables."""
    utterances = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        compare_collators(Path(name) / "demo")
        useful_share()
        large_dataset(Path(name) / "large", utterances)


if __name__ == "__main__":
    main()
