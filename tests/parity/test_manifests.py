"""All networks at their real sizes, on no device at all: names, order, shapes and types of their tensors are the official ones."""

import json
import random

import numpy as np
import pytest
import torch
from cosyexp.registry import build
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.run.weights import our_name
from tests.support import folder_from

FAMILIES = {"cosyvoice": "v1", "cosyvoice2": "v2", "cosyvoice3": "v3"}


def built(family, model, part):
    """A node of the train config as it stands, nothing overridden, without memory behind its tensors."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR.resolve())):
        composed = compose("train", overrides=[f"family={family}", f"model={model}"])
    with torch.device("meta"):
        return build(OmegaConf.to_container(OmegaConf.select(composed, part), resolve=True))


def described(tensors):
    return [
        (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    ]


def manifest(name):
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
    found = {"model": {}, "discriminator": {}}
    for name, *rest in manifest(f"{FAMILIES[family]}_hifigan"):
        network, ours = our_name(name)
        found[network][ours] = rest
    for network, part in (("model", "network"), ("discriminator", "objective.discriminator")):
        tensors = built(family, "hifigan", part).state_dict()
        assert {name: rest for name, *rest in described(tensors)} == found[network]


@pytest.mark.parametrize("model", ["llm", "flow", "hifigan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_constructor_seeds_anything(family, model, monkeypatch):
    """Python's and numpy's generators stand where they stood, and nobody seeds torch's."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch was seeded"))
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    built(family, model, "network")
    assert (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    ) == before
