"""Export and synthesis on one GPU compute what the CPU computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support import MODELS, command, train_words

FORMATS = ("onnx", "jit", "pt2")
EXPORTED = {"llm": "llm.decode", "flow": "flow.decoder.estimator", "hifigan": "hift"}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of two steps, exported as ONNX and verified on the GPU."""
    folder = tmp_path_factory.mktemp("runs")
    for model in MODELS:
        command(
            "train", *train_words(model, data, "trainer.steps=2"), f"run_dir={model}", cwd=folder
        )
    return folder


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_an_export_is_verified_on_the_gpu(form, model, runs):
    words = [f"run_dir={model}", f"format={form}", f"components={EXPORTED[model]}", "device=cuda"]
    command("export", *words, cwd=runs)
    report = json.loads((runs / model / "exports" / form / "report.fp32.json").read_text())
    assert report["device"] == "cuda"
    if form == "onnx":
        assert "CUDAExecutionProvider" in report["runtime"]
    entry = report["components"][EXPORTED[model]]
    assert entry["passed"] and all(
        times["exported"] > 0 for times in entry["milliseconds"].values()
    )


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_synthesis_is_that_of_the_cpu(backend, runs, tmp_path):
    given = [f"{model}={runs / model}" for model in MODELS]
    if backend == "onnx":
        for model in MODELS:
            command("export", f"run_dir={model}", "latency=false", "device=cuda", cwd=runs)
    waves = []
    for device in ("cpu", "cuda"):
        words = ["text=hello there", f"backend={backend}", f"device={device}", *given]
        command("synthesize", *words, f"out={device}.wav", cwd=tmp_path)
        waves.append(soundfile.read(tmp_path / f"{device}.wav")[0])
    assert len(waves[0]) == len(waves[1])
    assert np.abs(waves[0] - waves[1]).max() < 1e-3 < np.abs(waves[0]).max()


def test_preference_pairs_on_the_gpu(runs, data, tmp_path):
    words = [f"run_dir={runs}/llm", "data=prepared", f"data.dir={data}", "limit=2", "device=cuda"]
    output = command("prefer", *words, "out=pairs", cwd=tmp_path).stdout
    assert "pairs: 4 pairs" in output
