"""30 steps of every objective and family at tiny size: each loss and gradient norm is what it was.

The numbers are in `<objective>_<model>_<family>.json`. A change that is not meant to change them does not; one that is says why
in its commit, which holds the files that `python -m pytest tests/golden --refresh` wrote. fp32 on one thread. On the processor and
the torch of the files every digit is compared; another one adds in another order, which leaves fewer digits.
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
RATES = {"demo": 50, "cosyvoice": 50, "cosyvoice2": 25, "cosyvoice3": 25}  # speech tokens a second
RATE_OF = {
    "llm": "1e-3",
    "flow": "1e-3",
    "hifigan": "1e-5",
}  # a vocoder of random weights learns chaotically at more
NAMES = (
    "train/loss",
    "train/grad_norm",
    "train/discriminator_loss",
    "train/discriminator_grad_norm",
)
SAMPLE_RATE = 24000


# where the processor is another one; the mel loss of a random vocoder has gradients that amplify rounding without bound
TOLERANCES = {"loss": 1e-5, "norm": 1e-3}
TOLERANCES_HIFIGAN = {"loss": 1e-2, "norm": 1.0}


def machine() -> str:
    """The processor and the torch by which the numbers come out the same to the last digit."""
    found = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    return f"{found[1] if found else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def tone(seconds: float, draw: np.random.Generator) -> bytes:
    """A WAV file of a gliding voice: harmonics of 100 to 250 Hz, louder and softer, and a little noise."""
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
    """Utterances of speech tokens, an answer to reject, and audio, all drawn from their number."""
    for i in range(count):
        draw = keyed("golden", split, i)
        seconds = float(draw.uniform(0.8, 1.6))
        tokens = draw.integers(512, size=round(seconds * rate)).tolist()
        embedding = draw.standard_normal(192).astype(np.float32)
        yield {
            "utt": f"{split}{i}",
            "text": "".join(draw.choice(list("abcdefgh ,"), size=int(draw.integers(5, 15)))).strip(
                ", "
            )
            or "a",
            "spk": "one",
            "audio_data": tone(seconds, draw),
            "utt_embedding": embedding,
            "spk_embedding": embedding,
            "speech_token": tokens,
            "reject_speech_token": draw.permutation(tokens)[: -int(draw.integers(1, 5))].tolist(),
        }


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A folder with train.list and valid.list for each token rate."""
    folders = {}
    for rate in set(RATES.values()):
        folders[rate] = tmp_path_factory.mktemp(f"golden{rate}")
        for split, count in (("train", 20), ("valid", 2)):
            shard = folders[rate] / f"{split}.parquet"
            write_shard(shard, list(rows(count, rate, split)))
            write_list(folders[rate] / f"{split}.list", [shard])
    return folders


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize(("mode", "model"), TASKS)
def test_losses_and_gradient_norms_are_what_they_were(
    mode, model, family, lists, warm, tmp_path, request
):
    folder = lists[RATES[family]]
    network = (
        family_words(family, model) if family in FAMILIES else [f"model={model}", *TINY[model]]
    )
    words = [
        *network,
        f"mode={mode}",
        "data=parquet",
        f"data.train={folder}/train.list",
        f"data.valid={folder}/valid.list",
    ]
    words += [
        "run_dir=run",
        f"trainer.steps={STEPS}",
        "trainer.log_every=1",
        "trainer.valid_every=0",
        "trainer.valid_epochs=0",
    ]
    words += [
        "trainer.previews=0",
        "data.processes=1",
        f"optimizer.lr={RATE_OF[model]}",
        "model.warmup=10",
        "data.max_frames=300",
    ]
    if mode == "dpo":
        warm(
            "train",
            *network,
            *words[len(network) + 1 :],
            "run_dir=sft",
            "trainer.steps=0",
            cwd=tmp_path,
        )
        words.append("init_from=sft")
    warm("train", *words, cwd=tmp_path)
    lines = [line for line in metrics(tmp_path / "run") if "train/loss" in line]
    found = {"machine": machine()} | {
        name: [line[name] for line in lines] for name in NAMES if name in lines[0]
    }
    path = HERE / f"{mode}_{model}_{family}.json"
    if request.config.getoption("--refresh"):
        path.write_text(json.dumps(found, indent=0) + "\n")
    wanted = json.loads(path.read_text())
    assert len(lines) == STEPS and found.keys() == wanted.keys()
    if found["machine"] == wanted["machine"]:
        assert found == wanted
        return
    tolerances = TOLERANCES_HIFIGAN if model == "hifigan" and family != "demo" else TOLERANCES
    for name in wanted.keys() - {"machine"}:
        assert found[name] == pytest.approx(
            wanted[name], rel=tolerances["norm" if "norm" in name else "loss"]
        ), name
