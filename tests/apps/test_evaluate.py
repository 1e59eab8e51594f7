"""The evaluate app, the callback of that name, the model card, and the pages in a browser."""

import csv
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

from cosyexp.cli.compose import compose_train
from cosyexp.data.draws import keyed
from cosyexp.data.shards import write_shard
from cosyexp.registry import build
from tests.apps.warm import Warm
from tests.support import ROOT, RUNS, TINY, contents, metrics, sentence
from tests.tones import tone

LAB = ["--config-dir", "mylab/conf", "trusted=[mylab]"]
TOKENS = np.arange(20)
VALIDATIONS = (0, 20, 40, 60)  # steps


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the systems in evaluation.json."""
    systems: dict[str, dict[str, Any]] = json.loads((folder / "evaluation.json").read_text())[
        "systems"
    ]
    return systems


@pytest.fixture(scope="module")
def evaluated(trained: Path, warm: Warm) -> Path:
    """The folder of an evaluation of three runs, repeated as `again`."""
    for out in ("evaluation", "again"):
        warm("evaluate", *RUNS, "judge=similarity", "limit=2", f"out={out}", cwd=trained)
    return trained / "evaluation"


# the app ------------------------------------------------------------------------------------------


def test_each_model_and_all_together_are_measured(evaluated):
    found = {name: set(system) for name, system in read(evaluated).items()}
    mel = {"mel_l1", "mcd"}
    assert found == {
        "llm": {"accuracy", "perplexity"},
        "vocoder": {
            *mel,
            "stft_convergence",
            "stft_magnitude",
            "f0_cents",
            "voicing_error",
            "similarity",
        },
        "copy_synthesis": {*mel, "similarity"},
        "synthesis": {"duration_ratio", "similarity"},
    }
    for system in read(evaluated).values():
        for summary in system.values():
            assert summary["low"] <= summary["mean"] <= summary["high"]
            assert summary["utterances"] == 2
    clock = json.loads((evaluated / "timing.json").read_text())["rtf"]
    assert set(clock) == {"vocoder", "copy_synthesis", "synthesis"}


def test_a_repeated_evaluation_gives_the_same_bytes(evaluated):
    one, other = contents(evaluated), contents(evaluated.with_name("again"))
    assert set(one) == {"evaluation.json", "utterances.csv", "evaluation.html", "timing.json"}
    assert {name for name in one if one[name] != other[name]} <= {"timing.json"}


def test_the_table_of_utterances_has_what_the_means_are_of(evaluated):
    rows = list(csv.DictReader((evaluated / "utterances.csv").open()))
    assert len(rows) == 2 * 5  # with the recordings
    values = [float(row["mcd"]) for row in rows if row["system"] == "vocoder"]
    assert np.mean(values) == pytest.approx(read(evaluated)["vocoder"]["mcd"]["mean"])


def test_accuracy_and_perplexity_are_those_of_the_validation(trained, warm):
    warm("evaluate", "llm=runs/demo/llm", "judge=[]", "out=alone", cwd=trained)
    llm = read(trained / "alone")["llm"]
    about = json.loads((trained / "alone/evaluation.json").read_text())["models"]["llm"]
    meta = yaml.safe_load(Path(trained, about["weights"]).with_name("meta.yaml").read_text())
    assert llm["accuracy"]["mean"] == pytest.approx(meta["loss_dict"]["acc"], abs=1e-6)
    assert math.log(llm["perplexity"]["mean"]) == pytest.approx(meta["loss_dict"]["ce"], rel=1e-5)


def test_exports_give_the_numbers_of_their_run(trained, warm, tmp_path):
    run = f"run_dir={trained}/runs/demo/hifigan"
    warm("export", run, "format=jit", "latency=false", cwd=tmp_path)
    words = [f"hifigan={trained}/runs/demo/hifigan", "judge=[]", "limit=1"]
    for backend in ("torch", "jit"):
        warm("evaluate", *words, f"backend={backend}", f"out={backend}", cwd=tmp_path)
    one, other = (read(tmp_path / backend)["vocoder"] for backend in ("torch", "jit"))
    assert other["mel_l1"]["mean"] == pytest.approx(one["mel_l1"]["mean"], rel=1e-3)


def test_an_official_file_is_evaluated_without_a_run(data, warm, tmp_path):
    torch.manual_seed(0)
    network = build(compose_train(["family=demo", "model=flow"]).network, "network")
    torch.save(network.state_dict(), tmp_path / "flow.pt")
    words = ["official=demo", "flow=flow.pt", "judge=[]", "limit=1"]
    sentence(warm("evaluate", *words, cwd=tmp_path, check=False), "no validation data", "valid=")
    said = warm("evaluate", *words, f"valid={data}/valid.list", cwd=tmp_path).stdout
    assert "copy_synthesis" in said and read(tmp_path / "evaluation")["copy_synthesis"]["mcd"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["nothing to evaluate", "llm=, flow= or hifigan="]),
        (["exports=a", "llm=b"], ["exports= excludes runs", "backend="]),
        (["official=demo", "llm=llm.pt", "backend=onnx"], ["official=", "leave out"]),
        (["llm=nowhere", "judge=[]"], ["nowhere is not a run directory"]),
        (["flow=runs/demo/llm", "judge=[]"], ["is a run of llm"]),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_sentence(words, parts, trained, warm):
    sentence(warm("evaluate", *words, "out=refused", cwd=trained, check=False), *parts)
    assert not (trained / "refused").exists()


def test_the_card_has_the_evaluation_of_the_exported_weights(trained, evaluated, warm, tmp_path):
    shutil.copytree(trained / "runs/demo/hifigan", tmp_path / "hifigan")
    words = ["run_dir=hifigan", "format=official", "license=cc0-1.0"]
    words += [f"evaluation={evaluated}", "out=voice"]
    warm("export", *words, cwd=tmp_path)
    card = (tmp_path / "voice/MODEL.md").read_text()
    mean = read(evaluated)["vocoder"]["mcd"]["mean"]
    for part in ("license: cc0-1.0", "| step | 4 |", "valid", f"| mcd | {mean:.4g} ["):
        assert part in card
    older = "weights=hifigan/checkpoints/step_00000000/hifigan.safetensors"
    warm("export", *words, older, cwd=tmp_path)
    other = (tmp_path / "voice/MODEL.md").read_text()
    assert "Evaluation" not in other and other.count("# hifigan") == 1
    shutil.copytree(trained / "runs/demo/llm", tmp_path / "llm")
    warm("export", "run_dir=llm", "format=official", "out=voice", cwd=tmp_path)
    assert "# hifigan" in (tmp_path / "voice/MODEL.md").read_text()


# the callback -------------------------------------------------------------------------------------


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Utterances that all count from 0 to 19; the validation has these tokens in another order.

    An llm learns to count, and when to stop. The surer it is, the higher is its validation loss.
    """
    for i in range(12):
        draw = keyed(split, i)
        embedding = draw.standard_normal(192).astype(np.float32)
        yield {
            "utt": f"{split}{i}",
            "text": "".join(draw.choice(list("abcd"), size=8)),
            "spk": "one",
            "audio_data": tone(0.4, draw),
            "utt_embedding": embedding,
            "spk_embedding": embedding,
            "speech_token": (TOKENS if split == "train" else draw.permutation(TOKENS)).tolist(),
        }


def training(trained: Path, *words: str) -> list[str]:
    return [
        *LAB,
        "model=llm",
        *TINY["llm"],
        "data=parquet",
        *(f"data.{split}={split}.parquet" for split in ("train", "valid")),
        "data.processes=1",
        "optimizer.lr=3e-2",
        "model.warmup=0",
        "trainer.valid_epochs=0",
        f"trainer.steps={VALIDATIONS[-1]}",
        f"trainer.valid_every={VALIDATIONS[1]}",
        "logger=jsonl",
        "callbacks=evaluate",
        "judge@callbacks.evaluate.judges=pace",
        "callbacks.evaluate.utterances=2",
        *(f"callbacks.evaluate.{name}={trained}/runs/demo/{name}" for name in ("flow", "hifigan")),
        *words,
    ]


@pytest.fixture(scope="module")
def overfit(trained: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose loss is lowest where it has hardly learned to speak."""
    folder = tmp_path_factory.mktemp("overfit")
    shutil.copytree(ROOT / "examples/mylab/mylab", folder / "mylab")
    for split in ("train", "valid"):
        write_shard(folder / f"{split}.parquet", list(rows(split)))
    warm("train", *training(trained), "run_dir=run", cwd=folder)
    return folder


def validations(run: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in metrics(run) if "valid/loss" in line]
    return {line["step"]: line for line in lines}


def test_a_checkpoint_chosen_by_a_judge_beats_that_of_the_lowest_loss(overfit, trained, warm):
    found = validations(overfit / "run")
    assert tuple(found) == VALIDATIONS
    by_loss, by_pace = (
        min(VALIDATIONS[1:], key=lambda step: found[step][f"valid/{name}"])
        for name in ("loss", "pace_error")
    )
    assert by_loss < by_pace
    metric = ["metric=pace_error"]
    average = warm("average", "run_dir=run", *metric, "num=1", cwd=overfit).stdout
    assert int(average.splitlines()[1].split()[0]) == by_pace
    errors = []
    for name, words in (("loss", []), ("pace", metric)):
        others = [f"{model}={trained}/runs/demo/{model}" for model in ("flow", "hifigan")]
        measure = [*LAB, "llm=run", *others, "judge=pace", "limit=4", "seed=1", f"out={name}"]
        warm("evaluate", *measure, *words, cwd=overfit)
        errors.append(read(overfit / name)["synthesis"]["pace_error"]["mean"])
    assert errors[1] < errors[0]
    exported = ["run_dir=run", "format=official", *metric]
    said = warm("export", *exported, cwd=overfit).stdout
    assert f"step_{by_pace:08d}" in said


def test_a_resumed_run_measures_the_same(overfit, trained, warm):
    shutil.copytree(overfit / "run", overfit / "resumed")
    for step in VALIDATIONS[2:]:
        shutil.rmtree(overfit / f"resumed/checkpoints/step_{step:08d}")
    warm("train", *training(trained), "run_dir=resumed", cwd=overfit)
    assert validations(overfit / "resumed") == validations(overfit / "run")
    one, other = (contents(overfit / name) for name in ("run", "resumed"))
    kept = [name for name in one if name.startswith("listen/") or name.endswith("llm.safetensors")]
    assert len(kept) > 8 and all(one[name] == other[name] for name in kept)


def test_the_page_of_a_run_has_each_sentence_at_each_step(overfit):
    page = (overfit / "run/listen.html").read_text()
    named = [name for name in contents(overfit / "run") if name.startswith("listen/")]
    assert len(named) == 2 * (1 + len(VALIDATIONS))
    assert all(f'src="{name}"' in page for name in named)


def test_the_other_two_models_must_be_given(data, warm, tmp_path):
    words = ["model=flow", *TINY["flow"], "data=prepared", f"data.dir={data}", "data.processes=1"]
    words += ["callbacks=evaluate", "callbacks.evaluate.llm=runs/llm", "trainer.steps=1"]
    sentence(warm("train", *words, cwd=tmp_path, check=False), "callbacks.evaluate.hifigan=<run>")


# in a browser -------------------------------------------------------------------------------------


def screenshot(page: Path, folder: Path) -> np.ndarray:
    """Returns the pixels of a page in headless Chromium, (height, width, 3)."""
    if not (browser := shutil.which("chromium")):
        pytest.skip("chromium is not installed, which takes screenshots of pages")
    picture = folder / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder}/profile", f"--screenshot={picture}"]
    size = "--window-size=1280,1600"
    command = [browser, *flags, size, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    return np.asarray(matplotlib.image.imread(picture))[..., :3]


def ink(pixels: np.ndarray) -> int:
    """Returns the number of dark pixels: text, and the buttons of players."""
    return int((pixels.max(axis=2) < 0.4).sum())


def test_the_evaluation_is_shown_in_a_browser(evaluated, tmp_path):
    pixels = screenshot(evaluated / "evaluation.html", tmp_path)
    assert pixels.shape == (1600, 1280, 3)
    # the spectrograms are in the colours of inferno, the page itself is grey
    colourful = np.ptp(pixels, axis=2) > 0.3
    assert colourful[:, 100:-100].sum() > 20_000
    # there is text at the top, and a white margin
    assert ink(pixels[:400]) > 500 and (pixels[:, :10] > 0.9).all()


def test_the_page_of_a_run_is_shown_in_a_browser(overfit, tmp_path):
    pixels = screenshot(overfit / "run/listen.html", tmp_path)
    assert ink(pixels[:600]) > 500
