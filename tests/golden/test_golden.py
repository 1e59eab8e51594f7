"""Golden numbers: the losses and gradient norms of 30 steps, for every objective and family.

They are in `<mode>_<model>_<family>.json`, of tiny networks in fp32 on one thread. A refactoring
must not change them. A commit that changes them on purpose says why, and contains the files that
`python -m pytest tests/golden --refresh` wrote.

On the processor and with the torch that wrote a file, every digit is compared. Others add in
another order, so that there the numbers are compared up to a tolerance.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import metrics
from tests.tones import RATES, TASKS, train_words

HERE = Path(__file__).parent
STEPS = 30
NAMES = (
    "train/loss",
    "train/grad_norm",
    "train/discriminator_loss",
    "train/discriminator_grad_norm",
)
# relative, on another machine; the mel loss of a random vocoder amplifies rounding without bound
TOLERANCES = {"loss": 1e-5, "norm": 1e-3}
CHAOTIC_TOLERANCES = {"loss": 1e-2, "norm": 1.0}


def machine() -> str:
    """Returns the processor and the version of torch, which determine the numbers exactly."""
    path = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    processor = match[1] if match else "unknown"
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


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
