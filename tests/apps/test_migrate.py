"""docs/migrate.md: each line of its tables does what it says, at tiny size."""

import json
import re
from pathlib import Path

import pytest

from tests.apps.warm import Warm
from tests.support import QUICK, ROOT, TINY, family_words

TABLES = re.split(r"^## ", (ROOT / "docs" / "migrate.md").read_text(), flags=re.MULTILINE)


def commands(table: str) -> list[str]:
    """The middle cells of a table, and the keys in the text below it, in backticks."""
    (text,) = [part for part in TABLES if part.startswith(table)]
    cells = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| `")]
    below = re.findall(r"`([a-z_]+\.[a-z_]+=\S+)`", text.rpartition("|")[2])
    assert len(cells) > 1
    return [cell.strip("`") for cell in [*cells, *below] if cell.startswith("`") or "=" in cell]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data: Path, warm: Warm) -> Path:
    """A folder with every file that the page names."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("migrate")
    for name in ("train", "valid"):
        lines = (data / f"{name}.list").read_text().splitlines()
        shards = [str(data / line) for line in lines]
        target = {"train": "train.list", "valid": "dev.list"}[name]
        (folder / target).write_text("\n".join(shards) + "\n")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    for model, run in (("llm", "exp/llm"), ("flow", "exp/flow")):
        words = ["trainer.steps=2", "trainer.valid_every=1", "checkpoint.every=1", f"run_dir={run}"]
        warm("train", *tiny(model), *words, cwd=folder)
    warm("export", "format=official", "run_dir=exp/llm", "out=.", cwd=folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "qwen")
    return folder


def tiny(model: str) -> list[str]:
    """Words that train in a second on the page's lists."""
    lists = ["data=parquet", "data.train=train.list", "data.valid=dev.list"]
    return [f"model={model}", *TINY[model], *QUICK, *lists, "data.limit=8"]


@pytest.mark.parametrize("line", commands("train.py"))
def test_a_flag_of_train(line, place, warm, tmp_path):
    words = line.split()
    base = tiny("flow" if line == "model=flow" else "llm")
    if line.startswith("family="):
        base = [*family_words("cosyvoice2", "llm"), *base[len(TINY["llm"]) :]]
    warm("train", *base, f"run_dir={tmp_path}", "trainer.steps=1", *words, cwd=place)
