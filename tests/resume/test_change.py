"""`resume.change` goes on with another value of a setting, on the same optimizer state."""

import shutil
from pathlib import Path

import pytest
import yaml

from cosyexp.run.tensors import read_tensors
from tests.support import metrics, sentence, train_words

ENGINES = {
    "llm": ["engine=ddp"],
    "flow": ["engine=deepspeed", "engine.stage=2"],
    "hifigan": ["engine=ddp"],
}


def moved(run: Path, network: str, first: int, last: int) -> float:
    """How far a network moved between two checkpoints: the sum over its tensors."""
    before, after = (
        read_tensors(run / f"checkpoints/step_{step:08d}/{network}.safetensors")
        for step in (first, last)
    )
    return sum(float((after[name].double() - before[name].double()).norm()) for name in before)


@pytest.mark.parametrize("model", ENGINES)
def test_another_learning_rate_on_the_same_state(model, data, warm, tmp_path):
    steps = ["trainer.valid_every=0", "checkpoint.every=1", "checkpoint.keep_last=9"]
    words = train_words(model, data, *steps, *ENGINES[model], "optimizer.lr=1e-4")
    words += ["optimizer.weight_decay=0"] if model == "hifigan" else []
    warm("train", *words, "trainer.steps=3", "run_dir=same", cwd=tmp_path)
    shutil.copytree(tmp_path / "same", tmp_path / "changed")
    warm("train", *words, "trainer.steps=4", "run_dir=same", cwd=tmp_path)
    change = ["optimizer.lr=3e-4", "resume.change=[optimizer.lr]", "run_dir=changed"]
    output = warm("train", *words, "trainer.steps=4", *change, cwd=tmp_path).stdout
    assert "optimizer.lr changes from 0.0001 to 0.0003" in output

    # an update of Adam is proportional to the learning rate
    for network in ("discriminator", "hifigan") if model == "hifigan" else (model,):
        before, now = (moved(tmp_path / run, network, 3, 4) for run in ("same", "changed"))
        # the generator is updated after the discriminator, which moved further too
        assert now == pytest.approx(3 * before, rel=1e-2) and before > 0

    run = tmp_path / "changed"
    (record,) = yaml.safe_load((run / "changes.yaml").read_text())
    assert record["step"] == 3
    assert record["changes"]["optimizer.lr"] == {"from": 1e-4, "to": 3e-4}
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["optimizer"]["lr"] == 3e-4 and "resume" not in stored
    rates = [line["train/lr"] for line in metrics(run) if "train/lr" in line]
    assert rates[-1] > 2 * rates[-2]
    # from now on the run has the new value, and a change back must be asked for too
    output = warm("train", *words, "run_dir=changed", cwd=tmp_path, check=False)
    sentence(output, "begun with optimizer.lr=0.0003, not 0.0001", "resume.change=[optimizer.lr]")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["resume.change=[optimzer.lr]"], ["resume.change=optimzer.lr is not a key of this run"]),
        (
            ["optimizer.amsgrad=true", "resume.change=[optimizer.amsgrad]"],
            ["begun with optimizer.amsgrad="],
        ),
    ],
)
def test_a_change_that_cannot_be_made(words, parts, data, warm, tmp_path):
    begun = train_words("llm", data, "trainer.steps=1", "+optimizer.amsgrad=false", "run_dir=run")
    warm("train", *begun, cwd=tmp_path)
    output = warm("train", *begun, *words, cwd=tmp_path, check=False)
    sentence(output, *parts)


def test_a_change_of_the_network_is_refused_even_on_request(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=1")
    warm("train", *words, "run_dir=run", cwd=tmp_path)
    wider = ["network.llm.hidden=64", "resume.change=[network]", "run_dir=run"]
    output = warm("train", *words, *wider, cwd=tmp_path, check=False)
    assert "resume.change" not in sentence(output, "begun with network.llm.hidden=", "run_dir=")
