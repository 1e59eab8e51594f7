"""Golden numbers: the losses and gradient norms of 30 steps, for every objective and family.

They are in `<mode>_<model>_<family>.json`, of tiny networks in fp32 on one thread. A refactoring
must not change them. A commit that changes them on purpose says why, and contains the files that
`python -m pytest tests/golden --refresh` wrote.

On the processor and with the torch that wrote a file, every digit is compared. Others add in
another order, so that there the numbers are compared up to a tolerance.
"""

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from cosyexp.data.draws import keyed
from cosyexp.data.shards import write_list, write_shard
from tests.support import FAMILIES, TINY, family_words, metrics

HERE = Path(__file__).parent
STEPS = 30
TASKS = (("sft", "llm"), ("sft", "flow"), ("sft", "hifigan"), ("dpo", "llm"))
RATES = {
    "demo": 50,
    "cosyvoice": 50,
    "cosyvoice2": 25,
    "cosyvoice3": 25,
}  # speech tokens per second
# at a higher rate, the training of a random vocoder is chaotic
LEARNING_RATES = {"llm": "1e-3", "flow": "1e-3", "hifigan": "1e-5"}
NAMES = (
    "train/loss",
    "train/grad_norm",
    "train/discriminator_loss",
    "train/discriminator_grad_norm",
)
SAMPLE_RATE = 24000  # Hz
# relative, on another machine; the mel loss of a random vocoder amplifies rounding without bound
TOLERANCES = {"loss": 1e-5, "norm": 1e-3}
CHAOTIC_TOLERANCES = {"loss": 1e-2, "norm": 1.0}


def machine() -> str:
    """Returns the processor and the version of torch, which determine the numbers exactly."""
    path = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    processor = match[1] if match else "unknown"
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


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


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with train.list and valid.list, by token rate."""
    folders = {}
    for rate in set(RATES.values()):
        folders[rate] = tmp_path_factory.mktemp(f"golden{rate}")
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


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize(("mode", "model"), TASKS)
def test_losses_and_gradient_norms_have_not_changed(
    mode, model, family, lists, warm, tmp_path, request
):
    words = train_words(mode, model, family, lists[RATES[family]])
    if mode == "dpo":
        start = train_words("sft", model, family, lists[RATES[family]])
        warm("train", *start, "run_dir=sft", "trainer.steps=0", cwd=tmp_path)
        words.append("init_from=sft")
    warm("train", *words, "run_dir=run", f"trainer.steps={STEPS}", cwd=tmp_path)
    lines = [line for line in metrics(tmp_path / "run") if "train/loss" in line]
    found: dict[str, Any] = {"machine": machine()}
    found |= {name: [line[name] for line in lines] for name in NAMES if name in lines[0]}
    path = HERE / f"{mode}_{model}_{family}.json"
    if request.config.getoption("--refresh"):
        path.write_text(json.dumps(found, indent=0) + "\n")
    wanted = json.loads(path.read_text())
    assert len(lines) == STEPS and found.keys() == wanted.keys()
    if found["machine"] == wanted["machine"]:
        assert found == wanted
        return
    chaotic = model == "hifigan" and family != "demo"
    tolerances = CHAOTIC_TOLERANCES if chaotic else TOLERANCES
    for name in wanted.keys() - {"machine"}:
        tolerance = tolerances["norm" if "norm" in name else "loss"]
        assert found[name] == pytest.approx(wanted[name], rel=tolerance), name
