"""Every recipe of conf/experiment trains, at tiny size, for the families that it is for."""

from itertools import product
from pathlib import Path

import pytest
import torch

from cosyexp.cli.compose import compose_train
from cosyexp.cli.hydra_app import CONFIG_DIR
from cosyexp.config import TrainConfig
from cosyexp.registry import build
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.training.build import Job, train
from tests.support import checkpoints, family_words, metrics
from tests.tones import RATES

MODELS = {
    "finetune_llm": "llm",
    "finetune_flow": "flow",
    "finetune_vocoder": "hifigan",
    "dpo": "llm",
    "lora_llm": "llm",
    "lora_flow": "flow",
}
FINE_TUNING = [
    *product(["finetune_llm", "finetune_flow", "dpo"], ["cosyvoice", "cosyvoice3"]),
    ("finetune_flow", "cosyvoice2"),
    ("finetune_vocoder", "cosyvoice2"),
]


def tiny(recipe: str, family: str, model: str, lists: dict[int, Path], run: Path) -> list[str]:
    """Two steps of a recipe on tones; the groups that the recipe picks are not named."""
    named = (f"family={family}", f"model={model}")
    sizes = [word for word in family_words(family, model) if word not in named]
    folder = lists[RATES[family]]
    return [
        f"experiment={recipe}",
        *sizes,
        f"run_dir={run}",
        "data=parquet",
        f"data.train={folder}/train.list",
        f"data.valid={folder}/valid.list",
        "data.dir=null",
        "data.processes=1",
        "family.pitch=dio",  # harvest takes long
        "trainer.steps=2",
        "trainer.log_every=1",
        "trainer.previews=0",
        "checkpoint.every=2",
        "logger=jsonl",
    ]


def rates(config: TrainConfig, run: Path) -> list[float]:
    """Trains, and returns the learning rate of each step."""
    assert train(Job(config)).step == 2
    lines = metrics(run)
    found = [line["train/lr"] for line in lines if "train/lr" in line]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(found) == len(losses) == 2 and torch.tensor(losses).isfinite().all()
    return found


@pytest.mark.parametrize(("recipe", "family"), FINE_TUNING)
def test_a_recipe_fine_tunes_weights(recipe, family, lists, tmp_path):
    model, source, run = MODELS[recipe], tmp_path / "source.safetensors", tmp_path / "run"
    words = tiny(recipe, family, model, lists, run)
    config = compose_train([*words, f"family={family}", f"init_from={source}"])
    assert config.model.name == model and config.mode.name == ("dpo" if recipe == "dpo" else "sft")
    torch.manual_seed(1)
    initial = build(config.network, "network").state_dict()
    save_tensors(source, initial)
    assert rates(config, run) == [config.optimizer["lr"]] * 2
    assert checkpoints(run) == ["step_00000000", "step_00000002"]
    first, last = (
        read_tensors(run / f"checkpoints/step_{step:08}/{model}.safetensors") for step in (0, 2)
    )
    assert all(torch.equal(first[name], initial[name]) for name in initial)
    assert not all(torch.equal(last[name], initial[name]) for name in initial)


@pytest.mark.parametrize(
    ("recipe", "family"), product(["lora_llm", "lora_flow"], ["cosyvoice", "cosyvoice3"])
)
def test_a_recipe_trains_an_adapter(recipe, family, lists, tmp_path):
    model, source, run = MODELS[recipe], tmp_path / "source.safetensors", tmp_path / "run"
    words = tiny(recipe, family, model, lists, run)
    config = compose_train([*words, f"family={family}", f"init_from={source}"])
    assert config.model.name == model and config.optimizer["lr"] == 1e-4
    save_tensors(source, build(config.network, "network").state_dict())
    assert rates(config, run) == [1e-4] * 2
    adapter = read_tensors(run / "checkpoints/step_00000002/adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)


@pytest.mark.parametrize("model", ["llm", "flow"])
def test_a_recipe_trains_from_scratch(model, lists, tmp_path):
    words = tiny("from_scratch_libritts", "cosyvoice", model, lists, tmp_path / "run")
    config = compose_train([*words, f"model={model}"])
    assert (config.family.name, config.trainer.epochs) == ("cosyvoice", 200)
    first, second = rates(config, tmp_path / "run")
    assert second == pytest.approx(2 * first) and second < 1e-3  # it warms up


def test_every_recipe_is_tried():
    assert {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")} == {
        *MODELS,
        "from_scratch_libritts",
    }
