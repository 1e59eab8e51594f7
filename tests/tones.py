"""Small data sets: demo speech, gliding tones for every family, and words that train on them."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from cosyexp.data.corpora.demo import Demo
from cosyexp.data.draws import keyed
from cosyexp.data.preparation import PrepareOptions, prepare
from cosyexp.data.shards import write_list, write_shard
from tests.support import FAMILIES, TINY, family_words

TASKS = (("sft", "llm"), ("sft", "flow"), ("sft", "hifigan"), ("dpo", "llm"))
RATES = {
    "demo": 50,
    "cosyvoice": 50,
    "cosyvoice2": 25,
    "cosyvoice3": 25,
}  # speech tokens per second
# at a higher rate, the training of a random vocoder is chaotic
LEARNING_RATES = {"llm": "1e-3", "flow": "1e-3", "hifigan": "1e-5"}
SAMPLE_RATE = 24000  # Hz
CORPUS: dict[str, Any] = {"name": "demo", "minutes": 1.5, "held_out": 0.2, "seed": 0}


def prepare_demo(out: Path) -> Path:
    """Prepares a minute and a half of demo speech in a folder, and returns it."""
    rates: dict[str, Any] = {"token_rate": 50, "codes": 512, "speaker_dim": 192}
    options = PrepareOptions(**rates, shard_size=16, processes=1)
    prepare(Demo(**CORPUS), out, options, {"corpus": CORPUS, **rates})
    return out


def tone(seconds: float, draw: np.random.Generator) -> bytes:
    """Returns a WAV file of a gliding harmonic tone of 100 to 250 Hz with some noise."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    f0 = draw.uniform(100, 200) * (1 + 0.2 * np.sin(2 * math.pi * draw.uniform(1, 3) * time))
    phase = 2 * math.pi * np.cumsum(f0) / SAMPLE_RATE
    wave = sum(np.sin(n * phase) / n for n in range(1, 12)) * (
        0.6 + 0.4 * np.sin(2 * math.pi * 3 * time)
    )
    file = io.BytesIO()
    wave = 0.2 * wave + 0.005 * draw.standard_normal(len(time))
    soundfile.write(file, wave, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def rows(count: int, rate: int, split: str) -> Iterator[dict[str, Any]]:
    """Yields utterances of random text, speech tokens, rejected answers and audio.

    Args:
        count: number of utterances.
        rate: speech tokens per second.
        split: "train" or "valid".
    """
    for i in range(count):
        draw = keyed("golden", split, i)
        seconds = float(draw.uniform(0.8, 1.6))
        tokens = draw.integers(512, size=round(seconds * rate)).tolist()
        embedding = draw.standard_normal(192).astype(np.float32)
        text = "".join(draw.choice(list("abcdefgh ,"), size=int(draw.integers(5, 15))))
        yield {
            "utt": f"{split}{i}",
            "text": text.strip(", ") or "a",
            "spk": "one",
            "audio_data": tone(seconds, draw),
            "utt_embedding": embedding,
            "spk_embedding": embedding,
            "speech_token": tokens,
            "reject_speech_token": draw.permutation(tokens)[: -int(draw.integers(1, 5))].tolist(),
        }


def write_lists(parent: Path) -> dict[int, Path]:
    """Writes folders with train.list and valid.list, and returns them by token rate."""
    folders = {}
    for rate in set(RATES.values()):
        folders[rate] = parent / f"tones_{rate}hz"
        folders[rate].mkdir()
        for split, count in (("train", 20), ("valid", 2)):
            shard = folders[rate] / f"{split}.parquet"
            write_shard(shard, list(rows(count, rate, split)))
            write_list(folders[rate] / f"{split}.list", [shard])
    return folders


def train_words(mode: str, model: str, family: str, folder: Path) -> list[str]:
    """Returns the overrides of a training on the lists of a folder."""
    official = family in FAMILIES
    return [
        *(family_words(family, model) if official else [f"model={model}", *TINY[model]]),
        f"mode={mode}",
        "data=parquet",
        f"data.train={folder}/train.list",
        f"data.valid={folder}/valid.list",
        "data.processes=1",
        "data.max_frames=300",
        "trainer.log_every=1",
        "trainer.valid_every=0",
        "trainer.valid_epochs=0",
        "trainer.previews=0",
        f"optimizer.lr={LEARNING_RATES[model]}",
        "model.warmup=10",
    ]
