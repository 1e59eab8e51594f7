"""Fixtures of the parity tests: recorded numbers of the original, and a comparison with them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cosyexp.models.layers.encoder import Encoder
from tests.support import folder_from

Fixture = Callable[[str], dict[str, Any]]
LIMIT = 1e-4


@pytest.fixture
def fixture() -> Fixture:
    """Loads recorded numbers of the original, by the name of their folder."""

    def load(name: str) -> dict[str, Any]:
        path = folder_from("COSYEXP_PARITY", name, "fixture.pt")
        content: dict[str, Any] = torch.load(path, weights_only=True)
        return content

    return load


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Iterator[Callable[..., None]]:
    """Asserts an absolute or relative difference below a limit.

    The largest difference of each test is shown in pytest's summary.
    """
    seen: dict[str, float] = {}

    def check(name: str, found: Any, wanted: Any, limit: float = LIMIT) -> None:
        found, wanted = torch.as_tensor(found).detach().double(), torch.as_tensor(wanted).double()
        assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
        seen[name] = ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
        assert seen[name] < limit, (name, seen[name])

    yield check
    if seen:
        worst = max(seen, key=lambda name: seen[name])
        record_property("worst", f"{seen[worst]:.1e} ({worst})")


def encoder(arguments: dict[str, Any], layer: str) -> Encoder:
    """Builds our encoder from the original's constructor arguments."""
    return Encoder(
        in_width=arguments["input_size"],
        width=arguments["output_size"],
        heads=arguments["attention_heads"],
        hidden=arguments["linear_units"],
        blocks=arguments["num_blocks"],
        layer=layer,
        chunk=arguments.get("static_chunk_size", 0),
        dropout=arguments["dropout_rate"],
        attention_dropout=arguments["attention_dropout_rate"],
    )
