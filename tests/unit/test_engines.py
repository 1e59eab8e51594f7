"""Updates of every engine, against those of ddp.

Several ranks are in tests/invariants/test_engines.py.
"""

import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from cosyexp.cli.compose import compose_train
from cosyexp.errors import UserError
from cosyexp.objectives.base import Trainable
from cosyexp.registry import build
from cosyexp.training.engines.blocks import repeated_blocks
from cosyexp.training.engines.deepspeed import DeepSpeed, overridden
from cosyexp.training.engines.fsdp import FSDP
from tests.unit.lives import ENGINES, HALF, OPTIMIZERS, SCALES, life, lives

FINITE = [math.isfinite(scale) for scale in SCALES]
OTHERS = [name for name in ENGINES if name != "ddp"]


@pytest.fixture(scope="module")
def found() -> dict[Any, dict[str, Any]]:
    """The results of all trainings, in another process, as DeepSpeed changes global state."""
    calls: dict[Any, dict[str, Any]] = {
        (name, optimizer): {"name": name, "optimizer": optimizer}
        for name in ENGINES
        for optimizer in OPTIMIZERS
    }
    calls |= {(*key, "resumed"): {**options, "resumed": True} for key, options in calls.items()}
    plain: list[tuple[str, dict[str, Any]]]
    plain = [(name, {"name": name, "optimizer": "fused AdamW"}) for name in ENGINES]
    variants: dict[str, dict[str, Any]] = {
        "recomputed": {"activation_checkpointing": True},
        "fp16": {"precision": "fp16"},
        "bf16": {"precision": "bf16"},
    }
    for kind, options in variants.items():
        calls |= {(name, kind): {**call, **options} for name, call in plain}
    calls |= {
        ("fsdp", "gathered in bf16"): {
            "name": "fsdp",
            "optimizer": "fused AdamW",
            "precision": "bf16",
            "param_dtype": "bf16",
        }
    }
    for name, more in (("zero2", {}), ("zero3", {"offload_weights": True})):
        calls[name, "offloaded"] = {
            "name": name,
            "optimizer": "fused AdamW",
            "resumed": True,
            "offload_optimizer": True,
            **more,
        }
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(lives, calls).result()


def assert_equal(
    one: dict[str, Any], two: dict[str, Any], rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Asserts that weights and averages are the same."""
    for name in ("net", "ema", "sum"):
        assert one[name].keys() == two[name].keys()
        for key, tensor in one[name].items():
            torch.testing.assert_close(
                tensor, two[name][key], rtol=rtol, atol=atol, msg=f"{name} {key}"
            )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OTHERS)
def test_updates_are_those_of_ddp(found, name, optimizer):
    ours, theirs = found[name, optimizer], found["ddp", optimizer]
    assert ours["applied"] == theirs["applied"] == FINITE
    finite = [
        (a, b)
        for a, b, applied in zip(ours["norms"], theirs["norms"], FINITE, strict=True)
        if applied
    ]
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in finite)
    assert not any(
        map(
            math.isfinite,
            [a for a, applied in zip(ours["norms"], FINITE, strict=True) if not applied],
        )
    )
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ENGINES)
def test_a_saved_engine_goes_on_as_if_it_had_not_stopped(found, name, optimizer):
    resumed, straight = found[name, optimizer, "resumed"], found[name, optimizer]
    assert_equal(resumed, straight)
    assert resumed["norms"][HALF + 1 :] == straight["norms"][HALF + 1 :] and FINITE[HALF - 1]


@pytest.mark.parametrize("name", ENGINES)
def test_recomputed_activations_train_the_same_with_dropout(found, name):
    assert found[name, "recomputed"]["applied"] == FINITE
    for key, tensor in found[name, "recomputed"]["net"].items():
        if key != "seen":
            torch.testing.assert_close(
                tensor, found[name, "fused AdamW"]["net"][key], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_the_autocast_of_ddp(found, name, precision):
    ours, theirs, single = (
        found[name, precision],
        found["ddp", precision],
        found["ddp", "fused AdamW"],
    )
    assert (
        ours["applied"] == theirs["applied"] and sum(ours["applied"]) > 2
    )  # fp16 has to find its scale first
    assert_equal(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(
        tensor.dtype == torch.float32 for key, tensor in ours["net"].items() if key != "seen"
    )
    assert not torch.equal(ours["net"]["out.weight"], single["net"]["out.weight"])


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_offloaded_state_trains_the_same_and_resumes(found, name):
    assert found[name, "offloaded"]["applied"] == FINITE
    assert_equal(found[name, "offloaded"], found["ddp", "fused AdamW"], rtol=1e-5, atol=1e-6)


def test_weights_that_are_gathered_in_bf16_train_nearly_the_same(found):
    ours, theirs = found["fsdp", "gathered in bf16"], found["ddp", "bf16"]
    assert_equal(ours, theirs, rtol=0.2, atol=0.05)
    assert ours["net"]["out.weight"].dtype == torch.float32


def test_compiled_blocks_train_the_same(monkeypatch):
    """All but the code generation, which takes minutes on a CPU."""
    compiled, compile_it = list[nn.Module](), nn.Module.compile

    def quickly(self, **options):
        compiled.append(self)
        compile_it(self, **options, backend="aot_eager")

    plain = life("ddp", "fused AdamW")
    monkeypatch.setattr(nn.Module, "compile", quickly)
    ours = life("ddp", "fused AdamW", compile=True)
    assert len(compiled) == 2 and ours["applied"] == FINITE
    assert_equal(ours, plain, rtol=1e-5, atol=1e-6)


# errors ------------------------------------------------------------------------------------------


def test_a_missing_deepspeed_is_reported_in_a_sentence(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="not installed: pip install deepspeed"):
        DeepSpeed()


def test_fsdp_trains_one_network():
    engine = FSDP()
    trainable = Trainable(nn.Linear(2, 2), OPTIMIZERS["SGD"], lambda update, lr: lr)
    with pytest.raises(UserError, match="engine=fsdp trains one network, not one and two"):
        engine.setup({"one": trainable, "two": trainable}, [])
    engine.close()


OWN = {"gradient_clipping": 5.0, "zero_optimization": {"stage": 2}}


def test_a_deepspeed_json_is_merged_and_its_changes_are_listed(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"stage": 1, "overlap_comm": true}, "gradient_clipping": 1, '
        '"optimizer": {"type": "Lamb"}}'
    )
    config, line = overridden(OWN, path)
    assert config == {
        "gradient_clipping": 5.0,
        "zero_optimization": {"stage": 1, "overlap_comm": True},
    }
    assert "zero_optimization.stage=1 (was 2), zero_optimization.overlap_comm=True;" in line
    assert (
        "ignored: gradient_clipping (use trainer.max_grad_norm instead), "
        "optimizer (use optimizer= instead)" in line
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FSDP(param_dtype="half"), "engine.param_dtype=half is not supported"),
        (lambda: DeepSpeed(stage=4), "ZeRO has no stage 4"),
    ],
    ids=["gather", "stage"],
)
def test_an_unknown_option_is_named(make, sentence, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_bad_deepspeed_json_is_named(tmp_path, content):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"engine.ds_config={path}"):
        overridden(OWN, path)


# repeated blocks ---------------------------------------------------------------------------------

BLOCKS = {
    ("llm", "cosyvoice"): {"ConformerLayer": 6, "TransformerLayer": 14},
    ("llm", "cosyvoice2"): {"Qwen2DecoderLayer": 24},
    ("flow", "cosyvoice"): {"ConformerLayer": 6, "TransformerBlock": 64},
    ("flow", "cosyvoice2"): {"ConformerLayer": 10, "TransformerBlock": 56},
    ("flow", "cosyvoice3"): {"DiTBlock": 22},
    ("hifigan", "cosyvoice"): {"ResBlock": 8},
}


@pytest.mark.parametrize(("model", "family"), BLOCKS)
def test_the_repeated_blocks_of_a_network_are_found(model, family):
    with torch.device("meta"):  # without memory
        config = compose_train([f"family={family}", f"model={model}"])
        network = build(config.network, "network")
    kinds = [type(block).__name__ for block in repeated_blocks(network)]
    assert {kind: kinds.count(kind) for kind in kinds} == BLOCKS[model, family]
