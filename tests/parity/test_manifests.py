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
from omegaconf import OmegaConf
from torch import Tensor, nn

from cosyexp.cli.compose import compose
from cosyexp.registry import build
from cosyexp.run.headers import our_name
from tests.support import folder_from

Entry = tuple[str, list[int], str]  # name, shape and type of a tensor
FAMILIES = {"cosyvoice": "v1", "cosyvoice2": "v2", "cosyvoice3": "v3"}


def built(family: str, model: str, part: str) -> nn.Module:
    """Builds a network of the train config, without memory for its tensors.

    Args:
        family: such as cosyvoice2.
        model: llm, flow or hifigan.
        part: the key of the config, such as "objective.discriminator".
    """
    config = OmegaConf.create(compose("train", [f"family={family}", f"model={model}"]))
    with torch.device("meta"):
        module: nn.Module = build(OmegaConf.to_container(OmegaConf.select(config, part)), "network")
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
    assert described(built(family, model, "network").state_dict()) == manifest(
        f"{FAMILIES[family]}_{official}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_the_vocoder_in_training(family):
    """A training checkpoint of the original has both networks, and old names in one of them."""
    found: dict[str, dict[str, list[Any]]] = {"model": {}, "discriminator": {}}
    for name, *rest in manifest(f"{FAMILIES[family]}_hifigan"):
        network, ours = our_name(name)
        found[network][ours] = rest
    for network, part in (("model", "network"), ("discriminator", "objective.discriminator")):
        tensors = built(family, "hifigan", part).state_dict()
        assert {name: rest for name, *rest in described(tensors)} == found[network]


@pytest.mark.parametrize("model", ["llm", "flow", "hifigan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_constructor_seeds_anything(family, model, monkeypatch):
    """The generators of Python and numpy are not used, and that of torch is not seeded."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch was seeded"))
    before = random.getstate(), pickle.dumps(np.random.get_state())
    built(family, model, "network")
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before
