"""What the tests share: tiny networks, configs, and commands."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig

ROOT = Path(__file__).parents[1]
MODELS = ("llm", "flow", "hifigan")
RUNS = [f"{model}=runs/demo/{model}" for model in MODELS]  # the words that name them to synthesize

# networks that a step takes milliseconds of
TINY = {
    "llm": [
        "network.text_width=16",
        *(
            f"network.{part}.{size}"
            for part in ("text_encoder", "llm")
            for size in ("width=16", "heads=2", "hidden=32", "blocks=1")
        ),
        "data.max_frames=400",
    ],
    "flow": [
        *(
            f"network.encoder.{size}"
            for size in (
                "width=16",
                "heads=2",
                "hidden=32",
                "blocks=1",
                "dropout=0.1",
                "attention_dropout=0.1",
            )
        ),
        *(
            f"network.estimator.{size}"
            for size in ("channels=[16,16]", "blocks=1", "mid_blocks=1", "heads=2", "head_width=8")
        ),
        "network.regulator_layers=1",
        "model.collator.drop=0.2",
        "data.max_frames=700",
    ],
    "hifigan": [
        "network.channels=16",
        "network.f0.channels=8",
        "network.resblock_kernels=[3]",
        "network.dilations=[1]",
        "objective.discriminator.channels=[2,4]",
        "objective.discriminator.spectral_channels=2",
        "objective.discriminator.resolutions=[[256,64,256]]",
        "model.collator.segment=2048",
        "data.max_frames=24",
    ],
}
# the same for the networks of the official families
QWEN = ["width=16", "layers=1", "heads=2", "key_heads=1", "hidden=32"]
STACK = ["width=16", "heads=2", "hidden=32", "blocks=1"]
UNET = ["channels=[16]", "blocks=1", "mid_blocks=1", "heads=2", "head_width=8"]
DIT = ["width=32", "blocks=1", "heads=2", "head_width=16", "hidden=32", "kernel=5", "groups=4"]
HIFT = ["channels=16", "f0.channels=8", "resblock_kernels=[3]", "dilations=[1]"]
FAMILIES = {
    "cosyvoice": {
        "llm": [
            "text_width=16",
            *(f"{part}.{size}" for part in ("text_encoder", "llm") for size in STACK),
        ],
        "flow": [
            "regulator_layers=1",
            *(f"encoder.{size}" for size in STACK),
            *(f"estimator.{size}" for size in UNET),
        ],
        "hifigan": HIFT,
    },
    "cosyvoice2": {
        "llm": QWEN,
        "flow": [
            *(f"encoder.{size}" for size in [*STACK, "up_blocks=1"]),
            *(f"estimator.{size}" for size in UNET),
        ],
        "hifigan": HIFT,
    },
    "cosyvoice3": {
        "llm": QWEN,
        "flow": ["hidden=16", *(f"estimator.{size}" for size in DIT)],
        "hifigan": HIFT,
    },
}
SMALL = {
    "llm": ["data.max_frames=400", "tokenizer@family.tokenizer=characters"],
    "flow": ["data.max_frames=700"],
    "hifigan": [
        "data.max_frames=60",
        "objective.discriminator.channels=[2,4]",
        "objective.discriminator.spectral_channels=2",
        "objective.discriminator.resolutions=[[256,64,256]]",
    ],
}
QUICK = [
    "trainer.log_every=1",
    "trainer.valid_every=2",
    "trainer.valid_epochs=0",
    "trainer.previews=1",
    "data.processes=1",
]


def family_words(family: str, model: str) -> list[str]:
    """The words that make a network of an official family tiny."""
    sizes = [f"network.{size}" for size in FAMILIES[family][model]]
    return [f"family={family}", f"model={model}", *sizes, *SMALL[model]]


def no_dropout(model: str) -> list[str]:
    parts = {"llm": ("text_encoder", "llm"), "flow": ("encoder",), "hifigan": ()}[model]
    zeros = [f"network.{part}.dropout=0" for part in parts]
    return [*zeros, *(["network.encoder.attention_dropout=0"] if model == "flow" else [])]


def config(model: str, data: Path, *overrides: str) -> TrainConfig:
    """The config of `cosyexp.train` for a tiny network on prepared data."""
    words = [f"model={model}", "data=prepared", f"data.dir={data}", *TINY[model], *QUICK]
    return compose_train([*words, *overrides])


def command(
    app: str, *words: str, cwd: Path, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs an app as a user does."""
    result = subprocess.run(
        [sys.executable, "-m", f"cosyexp.{app}", *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def environment() -> dict[str, str]:
    """One thread: two busy processes with two threads each are many times slower."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def train_words(model: str, data: Path, *words: str) -> list[str]:
    return [f"model={model}", "data=prepared", f"data.dir={data}", *TINY[model], *QUICK, *words]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("time/")} for line in lines
    ]


def sentence(result: subprocess.CompletedProcess[str], *parts: str) -> str:
    """Asserts that a command failed with one sentence that holds all parts, and returns it."""
    assert result.returncode != 0, result.stdout
    said = result.stderr.strip().splitlines()
    assert said and said[-1].startswith("cosyexp: "), result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in said[-1], (part, said[-1])
    return said[-1]


def folder_from(variable: str, *parts: str) -> Path:
    """A folder of shared data; skips where this machine has none."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(
            f"{variable} is not set: this test reads shared data that is not part of the repository"
        )
    return Path(root, *parts)


def checkpoints(run: Path) -> Sequence[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, str]:
    """The files below a folder with their checksums, but for logs and caches, which a start that is refused may write."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".arrow", ".log") and path.name != ".lock"
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
