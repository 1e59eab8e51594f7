"""Shared by the tests: tiny networks, configs, and commands."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.exporting.verify import eager
from cosyexp.models.flow.components import Conditions, FixedConditions, Velocity
from cosyexp.models.flow.masked_diff import MaskedDiffWithXvec
from cosyexp.synthesis.backends import Runner

ROOT = Path(__file__).parents[1]
MODELS = ("llm", "flow", "hifigan")
RUNS = [f"{model}=runs/demo/{model}" for model in MODELS]  # overrides of synthesize

# overrides for networks that are trained in milliseconds per step
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
    """Returns overrides that make a network of an official family tiny."""
    sizes = [f"network.{size}" for size in FAMILIES[family][model]]
    return [f"family={family}", f"model={model}", *sizes, *SMALL[model]]


def no_dropout(model: str) -> list[str]:
    """Returns overrides that switch off all dropout."""
    parts = {"llm": ("text_encoder", "llm"), "flow": ("encoder",), "hifigan": ()}[model]
    zeros = [f"network.{part}.dropout=0" for part in parts]
    return [*zeros, *(["network.encoder.attention_dropout=0"] if model == "flow" else [])]


def config(model: str, data: Path, *overrides: str) -> TrainConfig:
    """Returns the config of `cosyexp.train` for a tiny network on prepared data."""
    return compose_train(train_words(model, data, *overrides))


def command(
    app: str,
    *words: str,
    cwd: Path,
    check: bool = True,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs an app in another process, as a user does; by default it must succeed."""
    result = subprocess.run(
        [sys.executable, "-m", f"cosyexp.{app}", *words],
        cwd=cwd,
        env={**environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def environment() -> dict[str, str]:
    """Returns the environment of a command, with one thread.

    Two busy processes with two threads each are many times slower.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def train_words(model: str, data: Path, *words: str) -> list[str]:
    """Returns the overrides of `cosyexp.train` for a tiny network on prepared data."""
    return [f"model={model}", "data=prepared", f"data.dir={data}", *TINY[model], *QUICK, *words]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("time/")} for line in lines
    ]


def sentence(result: subprocess.CompletedProcess[str], *parts: str) -> str:
    """Asserts that a command failed with one sentence that holds all parts, and returns it."""
    assert result.returncode != 0, result.stdout
    lines = result.stderr.strip().splitlines()
    assert lines and lines[-1].startswith("cosyexp: "), result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in lines[-1], (part, lines[-1])
    return lines[-1]


def folder_from(variable: str, *parts: str) -> Path:
    """Returns a folder of shared data; skips the test on a machine that has none."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(
            f"{variable} is not set: this test reads shared data that is not part of the repository"
        )
    return Path(root, *parts)


def checkpoints(run: Path) -> Sequence[str]:
    """Returns the names in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, str]:
    """Returns the checksums of the files below a folder, by relative path.

    Logs, locks and caches are left out, as a start that is refused may write them.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".log"
        and path.name != ".lock"
        and path.parent.suffix != ".fields"
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def flow_runners(network: Any) -> tuple[Runner, Runner]:
    """Returns the components of a flow network that synthesis runs."""
    conditions = Conditions if isinstance(network, MaskedDiffWithXvec) else FixedConditions
    components: list[Any] = [conditions(network), Velocity(network)]
    encode, velocity = (
        Runner(component.inputs, partial(eager, component), torch.device("cpu"))
        for component in components
    )
    return encode, velocity


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
