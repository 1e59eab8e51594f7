"""Adapters: what they start from, what peft makes of their files, and what is refused."""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.config.names import ADAPTER
from cosyexp.errors import UserError
from cosyexp.objectives.base import Loss
from cosyexp.registry import build
from cosyexp.run.adapters import adapter_note
from cosyexp.run.directory import RunDirectory
from cosyexp.run.networks import load_network
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.run.weights import load_weights, read_weights
from cosyexp.training.adapters import AdapterOff, select
from cosyexp.training.build import assemble, base_of, build_engine, build_objective
from cosyexp.training.trainer import Trainer
from cosyexp.training.validation import eval_mode
from tests.tones import RATES, train_words

KINDS = [("llm", "demo"), ("llm", "cosyvoice2"), ("flow", "cosyvoice"), ("flow", "cosyvoice3")]
VARIANTS = [
    *((model, family, []) for model, family in KINDS),
    ("llm", "demo", ["adapter.dora=true", "adapter.targets=[linear_q,linear_v,feed_forward]"]),
    ("flow", "cosyvoice3", ["adapter.rslora=true", "adapter.rank=2", "adapter.targets=[attn.to*]"]),
]
Made = Callable[..., Trainer]


@cache
def _composed(words: Sequence[str]) -> TrainConfig:
    return compose_train(words)


@pytest.fixture
def composed(lists: dict[int, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    """Returns the config of a training in memory that starts from `base.safetensors`."""

    def compose(model: str, family: str, *more: str, mode: str = "sft") -> TrainConfig:
        words = (*train_words(mode, model, family, lists[RATES[family]]), *more)
        config = copy.deepcopy(_composed(words))
        config.run_dir, config.logger = f"{tmp_path}/run", {}
        config.init_from = f"{tmp_path}/base.safetensors"
        return config

    return compose


@pytest.fixture
def made(composed: Callable[..., TrainConfig]) -> Made:
    """Builds a trainer in memory, whose network has random weights, or an adapter on them."""

    def make(model: str, family: str, *more: str, mode: str = "sft") -> Trainer:
        config = composed(model, family, *more, mode=mode)
        base = Path(str(config.init_from))
        if not base.exists():
            torch.manual_seed(1)
            save_tensors(base, build(config.network, "network").state_dict())
        trainer = assemble(config, RunDirectory(config.run_dir), build_engine(config))
        if not config.adapter:
            load_weights(module(trainer), base)
        trainer.setup()
        return trainer

    return make


def module(trainer: Trainer) -> nn.Module:
    return trainer.objective.trainables[trainer.model].module


def losses(trainer: Trainer) -> dict[str, Tensor]:
    """The sums of the losses of the first validation batch."""
    assert trainer.validation is not None
    micro = trainer.validation.first()
    assert micro is not None
    with eval_mode(trainer.objective):
        loss: Loss = trainer.objective.validate(micro.batch)
    return {name: term.sum for name, term in loss.items()}


def inputs(trainer: Trainer) -> tuple[Any, ...]:
    """What the objective passes to the network for the first training batch."""
    found: list[tuple[Any, ...]] = []
    hook = module(trainer).register_forward_pre_hook(lambda _, args: found.append(args))
    next(trainer.objective.losses(trainer.loader.next_step()[0].batch))
    hook.remove()
    return found[0]


@torch.no_grad()
def change(trainer: Trainer, seed: int = 0) -> None:
    """Gives the adapter numbers as after a long training."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module(trainer).named_parameters():
        if ".lora_" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def saved(trainer: Trainer, step: int = 1) -> Path:
    trainer.progress.step = step
    trainer.save("step")
    return trainer.run.checkpoints.all()[-1].path


@torch.no_grad()
def output(network: nn.Module, args: Sequence[Any], **kwargs: Any) -> Tensor:
    return network.eval()(*args, **kwargs)


def in_double(network: nn.Module, args: Sequence[Any]) -> Tensor:
    """The output without the rounding of fp32, which deep networks amplify."""
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    return output(copy.deepcopy(network).double(), doubled)


def on_base(trainer: Trainer, config: TrainConfig, folder: Path) -> Any:
    """What peft makes of the network without an adapter and the files of a checkpoint."""
    network = build(config.network, "network")
    note = adapter_note(folder / ADAPTER)
    assert note is not None
    network.load_state_dict(read_weights(Path(note.base))["model"])
    return peft.PeftModel.from_pretrained(network, str(folder))


@pytest.mark.parametrize(("model", "family", "words"), VARIANTS)
def test_peft_and_the_merged_weights_give_our_outputs(model, family, words, made, composed):
    plain = losses(made(model, family))
    trainer = made(model, family, "adapter=lora", *words)
    start = losses(trainer)
    assert all(torch.equal(start[name], plain[name]) for name in plain)  # to the last bit

    args = inputs(trainer)
    before = output(module(trainer), args)
    change(trainer)
    folder, ours = saved(trainer), output(module(trainer), args)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert torch.equal(output(AdapterOff(module(trainer)), args), before)
    assert torch.equal(output(module(trainer), args), ours)

    config = composed(model, family)
    assert torch.equal(output(on_base(trainer, config, folder), args), ours)
    merged = load_network(config.network, folder / ADAPTER)
    assert merged.state_dict().keys() == build(config.network, "network").state_dict().keys()
    error = in_double(merged, args) - in_double(module(trainer), args)
    assert error.abs().max() < 1e-6 * max(1.0, float(ours.abs().max()))
    names = read_tensors(folder / ADAPTER)
    assert sum(t.nbytes for t in names.values()) == sum(
        p.nbytes for p in module(trainer).parameters() if p.requires_grad
    )


@pytest.mark.parametrize(("model", "family"), [KINDS[0], KINDS[-1]])
def test_two_adapters_in_one_batch_equal_each_alone(model, family, made, composed):
    trainer = made(model, family, "adapter=lora")
    args, folders = inputs(trainer), []
    for seed in (1, 2):
        change(trainer, seed)
        folders.append(saved(trainer, seed))
    network = on_base(trainer, composed(model, family), folders[0])
    network.load_adapter(str(folders[1]), "other")
    alone = []
    for name in ("default", "other"):
        network.set_adapter(name)
        alone.append(output(network, args))
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    names = ["default" if row % 2 else "other" for row in range(len(args[0]))]
    both = output(network, args, adapter_names=names)
    for row, name in enumerate(names):
        theirs = alone[name == "other"][row]
        assert (both[row] - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max())), row


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("demo", "linear_k linear_out linear_q linear_v w_1 w_2"),
        ("cosyvoice2", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    ],
)
def test_the_default_targets_are_attention_and_feed_forward(family, names, made):
    adapter = made("llm", family, "adapter=lora").objective.trainables["llm"].adapter
    targets = {target.rpartition(".")[2] for target in adapter.config["target_modules"]}
    assert sorted(targets) == names.split()


def test_the_files_name_the_base(made):
    trainer = made("llm", "demo", "adapter=lora")
    note = trainer.objective.trainables["llm"].adapter.note
    config = json.loads((saved(trainer) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == note.base and config["revision"] == note.sha256
    assert adapter_note(saved(trainer) / ADAPTER) == note


def test_a_base_that_moved_is_found_in_the_run(made, tmp_path):
    trainer = made("llm", "demo", "adapter=lora")
    change(trainer)
    path = saved(trainer) / ADAPTER
    weights = read_weights(path)["model"]
    base = tmp_path / "base.safetensors"
    base.rename(tmp_path / "run/base.safetensors")
    found = read_weights(path)["model"]
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    (tmp_path / "run/base.safetensors").rename(base)
    save_tensors(base, {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()})
    with pytest.raises(UserError, match=r"is an adapter to other weights than those in .*base"):
        read_weights(path)
    base.unlink()
    with pytest.raises(UserError, match=r"is an adapter to .*base.safetensors, which is missing"):
        read_weights(path)


def test_an_adapter_can_be_the_base_of_another(made, composed):
    trainer = made("llm", "demo", "adapter=lora")
    change(trainer)
    path, args = saved(trainer) / ADAPTER, inputs(trainer)
    config = composed("llm", "demo", "adapter=lora")
    config.init_from = str(path)
    assert base_of(config) == path
    objective = build_objective(config)
    error = output(objective.trainables["llm"].module, args) - output(module(trainer), args)
    assert error.abs().max() < 1e-5


# preferences


@pytest.mark.parametrize("cached", [False, True])
def test_the_reference_is_the_policy_without_its_adapter(cached, made, tmp_path):
    words = [f"objective.cache_reference={cached}", "trainer.valid_every=1"]
    plain = made("llm", "demo", *words, mode="dpo")
    shutil.rmtree(tmp_path / "run")
    adapted = made("llm", "demo", *words, "adapter=lora", mode="dpo")
    change(adapted)
    load_weights(module(plain), saved(adapted) / ADAPTER)
    ours, theirs = losses(adapted), losses(plain)
    assert theirs["margin"].abs() > 1e-3
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    own = {id(p) for p in module(adapted).parameters()}
    frozen = [p for m in adapted.objective.frozen_modules for p in m.parameters()]
    assert {id(p) for p in frozen} <= own  # no second model


# refusals


def test_targets_that_do_not_exist_are_refused(made):
    network = module(made("llm", "demo"))
    for target in ("q_proj", "embed.out.1"):  # the latter is a norm
        with pytest.raises(UserError, match=rf"adapter.targets={target} matches nothing"):
            select(network, [target])


def test_a_vocoder_has_no_targets(made, composed):
    network = module(made("hifigan", "demo"))
    with pytest.raises(UserError, match="of which this network has none"):
        select(network, None)
    with pytest.raises(UserError, match="adapter= is for one network"):
        build_objective(composed("hifigan", "demo", "adapter=lora", "adapter.targets=[classifier]"))


def test_an_adapter_needs_weights_and_peft(made, composed, monkeypatch):
    made("llm", "demo")
    config = composed("llm", "demo", "adapter=lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'cosyexp\[lora\]'"):
        build_objective(config)
    config.init_from = None
    with pytest.raises(UserError, match="adapter= needs weights to adapt: give init_from="):
        base_of(config)


def test_an_adapter_that_does_not_fit_its_base_is_refused(made, tmp_path):
    trainer = made("llm", "demo", "adapter=lora")
    path = saved(trainer) / ADAPTER
    tensors, note = read_tensors(path), trainer.objective.trainables["llm"].adapter.note
    first = next(name for name in tensors if name.endswith("lora_B.weight"))
    for changed in (
        {**tensors, first: tensors[first][1:].clone()},
        {name: t for name, t in tensors.items() if name != first},
        {name.replace("llm.encoders", "llm.others"): t for name, t in tensors.items()},
    ):
        save_tensors(path, changed, note.metadata())
        with pytest.raises(UserError, match="does not fit its base"):
            read_weights(path)
    save_tensors(path, {**tensors, "x.lora_E": torch.ones(1)}, note.metadata())
    with pytest.raises(UserError, match="is not an adapter that cosyexp reads"):
        read_weights(path)


def test_other_metadata_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / ADAPTER
    for text in ("{", "[]", "{}", '{"base": 1, "sha256": "", "scaling": 1}'):
        save_tensors(path, {"a": torch.ones(1)}, {"cosyexp_adapter": text})
        with pytest.raises(UserError, match="is damaged, or not what cosyexp wrote"):
            adapter_note(path)
