"""Frozen parts, and learning rates and weight decay of single parameters."""

import sys

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import nn

from cosyexp.config import TrainerConfig
from cosyexp.errors import UserError
from cosyexp.objectives.base import ParameterRule, Trainable
from cosyexp.registry import build
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.parameters import freeze, matches, parameter_rules, table


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm1 = nn.Linear(2, 2), nn.LayerNorm(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm1(self.linear(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for part in (self.encoder, self.decoder):
            for block in part["layers"]:  # type: ignore[attr-defined]
                x = block(x)
        return self.head(x)


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.5)


def test_patterns_name_consecutive_parts():
    name = "llm.encoders.3.norm1.bias"
    for pattern in (
        "llm",
        "norm*",
        "encoders.3",
        "*.bias",
        "encoders.[0-3]",
        name,
        "*",
        "llm.*.bias",
    ):
        assert matches(pattern, name), pattern
    for pattern in ("ll", "norm", "encoders.1", "lm.encoders", "bias.llm", "encoders.[4-9]"):
        assert not matches(pattern, name), pattern


def test_each_parameter_has_its_rate_and_decay():
    network = Network()
    freeze(network, ["decoder"])
    config = TrainerConfig(
        lr_scales={"encoder.layers.0": 4, "encoder": 2}, no_decay=["bias", "norm*"], layer_decay=0.5
    )
    rules = parameter_rules(network, config)
    engine = DDP()
    engine.setup({"llm": Trainable(network, optimizer, lambda _, lr: lr, rules)}, ())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {
        names[id(parameter)]: (group["base_lr"], group["weight_decay"])
        for group in engine.optimizers["llm"].param_groups
        for parameter in group["params"]
    }
    expected = {"embedding.weight": (0.125, 0.5), "head.weight": (1.0, 0.5), "head.bias": (1.0, 0)}
    for layer, rate in ((0, 4 * 0.25), (1, 2 * 0.5)):
        for name in ("linear.weight", "linear.bias", "norm1.weight", "norm1.bias"):
            decay = 0.5 if name == "linear.weight" else 0
            expected[f"encoder.layers.{layer}.{name}"] = (rate, decay)
    assert groups == expected
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    engine.backward("llm", network(torch.tensor([0, 1, 2])).sum())
    engine.step("llm", 0)
    assert engine.learning_rate("llm") == 1.0
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("decoder"), name


def test_without_settings_an_optimizer_gets_a_list_of_parameters():
    network = Network()
    assert parameter_rules(network, TrainerConfig()) == {}
    trainable = Trainable(network, optimizer, lambda _, lr: lr)
    assert [id(p) for p in trainable.parameters()] == [id(p) for p in network.parameters()]


def test_the_table_has_a_line_for_each_part():
    network = Network()
    freeze(network, ["decoder", "encoder.layers.0.linear"])
    rules = {"encoder.layers.1.linear.weight": ParameterRule(0.25, False)}
    lines = table({"llm": Trainable(network, optimizer, lambda _, lr: lr, rules)}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "module parameters trained lr decay",
        "llm.embedding 6 6 1 0.5",
        "llm.encoder 20 14 0.25 to 1 0 to 0.5",
        "llm.decoder 10 0 - -",
        "llm.head 3 3 1 0.5",
    ]


def test_what_matches_nothing_is_refused():
    network = Network()
    for given, key in (
        (TrainerConfig(no_decay=["bias", "x"]), "trainer.no_decay"),
        (TrainerConfig(lr_scales={"x": 2}), "trainer.lr_scales"),
    ):
        with pytest.raises(UserError, match=f"{key}=x matches nothing in embedding, encoder,"):
            parameter_rules(network, given)
    with pytest.raises(UserError, match=r"trainer.freeze=x matches nothing in embedding"):
        freeze(network, ["x"])
    with pytest.raises(UserError, match=r"trainer.freeze=\[\*\] leaves nothing to train"):
        freeze(network, ["*"])
    for scales in ([1], {"head": 0}, {"head": "x"}, {"head": True}, 3):
        with pytest.raises(UserError, match="must map patterns to numbers > 0"):
            parameter_rules(network, TrainerConfig(lr_scales=scales))


# 8-bit optimizer; its steps need a GPU, and have not been tried


def adamw_8bit(monkeypatch, gpu: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    node = {"_target_": "cosyexp.training.optimizers.adamw_8bit", "_partial_": True, "lr": 0.1}
    return build({**node, "betas": [0.8, 0.9], "weight_decay": 0.2}, "optimizer")


def test_the_8_bit_optimizer_gets_its_settings_and_groups(monkeypatch):
    network = Network()
    rules = parameter_rules(network, TrainerConfig(no_decay=["bias"]))
    trainable = Trainable(network, adamw_8bit(monkeypatch, True), lambda _, lr: lr, rules)
    made = trainable.optimizer(trainable.parameters())
    assert isinstance(made, AdamW8bit)
    assert [group["weight_decay"] for group in made.param_groups] == [0.2, 0.0]
    assert all(tuple(g["betas"])[:2] == (0.8, 0.9) and g["lr"] == 0.1 for g in made.param_groups)


def test_the_8_bit_optimizer_needs_its_package_and_a_gpu(monkeypatch):
    parameters = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(UserError, match="needs a GPU: give optimizer=adamw"):
        adamw_8bit(monkeypatch, False)(parameters)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'cosyexp\[8bit\]'"):
        adamw_8bit(monkeypatch, True)(parameters)
