"""The networks of all families have the tensors of the official releases.

They are built at their real sizes on the meta device. Names, order, shapes and types are compared.
"""

import json
import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cosyexp.cli.compose import compose
from cosyexp.registry import build
from cosyexp.run.weights import our_name
from tests.support import folder_from

Entry = tuple[str, list[int], str]  # name, shape and type of a tensor
FAMILIES = {"cosyvoice": "v1", "cosyvoice2": "v2", "cosyvoice3": "v3"}


def build_network(family: str, model: str) -> nn.Module:
    """Builds the network of a family, with nothing overridden and no memory for its tensors."""
    return build_on_meta(compose_model(family, model)["network"], "network")


def compose_model(family: str, model: str) -> dict[str, Any]:
    return compose("train", [f"family={family}", f"model={model}"])


def build_on_meta(node: dict[str, Any], role: str) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = build(node, role)
        return module


def described(tensors: Mapping[str, Tensor]) -> list[Entry]:
    return [
        (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    ]


def manifest(name: str) -> list[Entry]:
    content = json.loads(folder_from("COSYEXP_PARITY", "manifests", f"{name}.json").read_text())[
        "state"
    ]
    return [(key, entry["shape"], entry["dtype"]) for key, entry in content.items()]


@pytest.mark.parametrize("model", ["llm", "flow", "hifigan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of(family, model):
    official = {"llm": "llm", "flow": "flow", "hifigan": "hift"}[model]
    assert described(build_network(family, model).state_dict()) == manifest(
        f"{FAMILIES[family]}_{official}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_the_vocoder_in_training(family):
    """A training checkpoint of the original has both networks, and old names in one of them."""
    found: dict[str, dict[str, list[Any]]] = {"model": {}, "discriminator": {}}
    for name, *rest in manifest(f"{FAMILIES[family]}_hifigan"):
        network, ours = our_name(name)
        found[network][ours] = rest
    config = compose_model(family, "hifigan")
    nodes = {"model": config["network"], "discriminator": config["objective"]["discriminator"]}
    for network, node in nodes.items():
        tensors = build_on_meta(node, "network").state_dict()
        assert {name: rest for name, *rest in described(tensors)} == found[network]


@pytest.mark.parametrize("model", ["llm", "flow", "hifigan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_constructor_seeds_anything(family, model, monkeypatch):
    """The generators of Python and numpy are not used, and that of torch is not seeded."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch was seeded"))
    before = random.getstate(), pickle.dumps(np.random.get_state())
    build_network(family, model)
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before
