"""Fine-tuning by the commands: adapters, frozen parts, plans."""

from pathlib import Path

import peft
import pytest
import torch

from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import read_tensors
from cosyexp.run.weights import read_weights
from tests.support import contents, metrics, sentence, train_words

LLM, LORA = "runs/demo/llm", "runs/demo/llm-lora"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapted(trained: Path, data: Path, warm) -> Path:
    """The folder `trained`, with an adapter of four steps to its llm."""
    words = train_words("llm", data, "adapter=lora", f"init_from={trained}/{LLM}")
    warm("train", *words, "trainer.steps=4", "trainer.ema=0.9", cwd=trained)
    return trained


def test_an_adapter_starts_from_its_base(adapted):
    base, ours = metrics(adapted / LLM)[-1], metrics(adapted / LORA)[0]
    assert ours["step"] == 0 and ours["valid/loss"] == base["valid/loss"]
    folder = adapted / LORA / "checkpoints/step_00000004"
    names = {path.name for path in folder.iterdir()}
    assert names == {ADAPTER, "adapter_config.json", "ema.safetensors", "meta.yaml", "trainer"}


@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_adapters_are_averaged_and_exported(method, adapted, warm, tmp_path):
    run, out = adapted / LORA, tmp_path / "out"
    named = "last2" if method == "uniform" else "last2-greedy"
    warm("average", f"run_dir={run}", "select=last", "num=2", f"method={method}", cwd=tmp_path)
    weights = f"weights={named}"
    for form in ("official", "peft"):
        warm("export", f"run_dir={run}", f"format={form}", weights, f"out={out}", cwd=tmp_path)
    merged = torch.load(out / "llm.pt", weights_only=True)
    network = build(RunDirectory(run).config().network, "network")
    base = read_weights(adapted / LLM / "checkpoints/step_00000004/llm.safetensors")["model"]
    assert list(merged) == list(base)
    network.load_state_dict(base)
    theirs = peft.PeftModel.from_pretrained(network, str(out)).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(merged[name], base[name]) for name in base)


def test_an_average_of_adapters_is_the_mean_of_their_factors(adapted, warm, tmp_path):
    words = [f"run_dir={adapted / LORA}", "select=last", "num=2"]
    warm("average", *words, f"output={tmp_path}/mean.safetensors", cwd=tmp_path)
    folders = [adapted / LORA / f"checkpoints/step_0000000{step}" for step in (2, 4)]
    first, second = (read_tensors(folder / ADAPTER) for folder in folders)
    for name, mean in read_tensors(tmp_path / "mean.safetensors").items():
        torch.testing.assert_close(mean, (first[name] + second[name]) / 2)
    result = warm("average", *words, f"output={tmp_path}/mean.pt", cwd=tmp_path, check=False)
    sentence(result, "is an adapter, which a .pt file cannot hold")
    assert not (tmp_path / "mean.pt").exists()


def test_an_export_of_whole_weights_as_an_adapter_is_refused(runs, refused):
    refused("export", [f"run_dir={runs}/llm", "format=peft"], "is not the adapter of a run")


def test_frozen_parts_stay(trained, data, warm, tmp_path):
    words = train_words("llm", data, f"init_from={trained}/{LLM}", "run_dir=frozen")
    frozen = "trainer.freeze=[text_encoder,'linear_[qk]']"
    output = warm("train", *words, frozen, "trainer.steps=2", cwd=tmp_path)
    before = read_weights(trained / LLM / "checkpoints/step_00000004/llm.safetensors")["model"]
    after = read_weights(tmp_path / "frozen/checkpoints/step_00000002/llm.safetensors")["model"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in before if "text_encoder." in n or ".linear_k" in n} <= same
    assert "llm.encoders.0.feed_forward.w_1.weight" not in same
    lines = [line.split() for line in output.stdout.splitlines()]
    assert ["llm.text_encoder", "2,848", "0", "-", "-"] in lines
    assert sum(line[:3] == ["module", "parameters", "trained"] for line in lines) == 1


@pytest.mark.parametrize("more", [[], ["adapter=lora", "init_from=runs/demo/llm"]])
def test_a_plan_writes_nothing(more, runs, data, warm, tmp_path):
    before = contents(tmp_path)
    words = [*train_words("llm", data), "engine.nproc_per_node=2", "run_dir=new", *more]
    output = warm("train", *words, "plan=true", cwd=tmp_path).stdout
    assert contents(tmp_path) == before
    table = {
        line.rsplit(maxsplit=5)[0]: line.rsplit(maxsplit=5)[1:]
        for line in output.splitlines()
        if line
    }
    names = ["ddp", *(f"deepspeed engine.stage={stage}" for stage in range(4)), "fsdp"]
    weights, gradients, optimizer, activations, total = (float(x) for x in table["ddp"])
    assert all(name in table for name in names) and activations > 0
    assert total == pytest.approx(weights + gradients + optimizer + activations, abs=0.3)
    assert "steps per epoch" in output and "with 2 ranks" in output


def test_a_pattern_that_matches_nothing_is_refused(data, refused):
    words = train_words("llm", data, "run_dir=new", "trainer.freeze=[nothing]")
    refused("train", words, "trainer.freeze=nothing matches nothing in", "text_embedding")


def test_a_run_of_another_adapter_or_base_does_not_go_on(adapted, data, warm, tmp_path):
    words = train_words("llm", data, "adapter=lora", f"run_dir={adapted / LORA}", "trainer.ema=0.9")
    result = warm("train", *words, "adapter.rank=4", cwd=tmp_path, check=False)
    sentence(result, "was begun with adapter.rank=8, not 4")
    base = adapted / LLM / "checkpoints/step_00000004/llm.safetensors"
    kept = base.read_bytes()
    base.write_bytes((adapted / LLM / "checkpoints/step_00000002/llm.safetensors").read_bytes())
    try:
        for app, more in (
            ("train", words),
            ("export", [f"run_dir={adapted / LORA}", "format=official"]),
        ):
            result = warm(app, *more, cwd=tmp_path, check=False)
            sentence(result, "is an adapter to other weights than those in")
    finally:
        base.write_bytes(kept)
    output = warm("train", *words, "trainer.steps=5", cwd=tmp_path).stdout
    assert "resuming at step 4" in output and "done at step 5" in output
