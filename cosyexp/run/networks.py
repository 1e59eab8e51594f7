"""Builds the network of a config for a file of weights, of which either may have any size."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cosyexp.errors import UserError
from cosyexp.registry import build, get_class
from cosyexp.run.headers import refuse_other_shapes, shapes_of, stored_shapes
from cosyexp.run.weights import load_weights

BUFFERS = 2**30  # bytes of the buffers of a network that are in no file


def load_network(node: Mapping[str, Any], path: Path) -> nn.Module:
    """Builds the network of a config node and loads its weights, which must fit.

    It is built without memory first and compared with the file, so that neither a config nor a file
    of another source allocates more than the two agree on.

    Raises:
        UserError: the network cannot be built, or the weights do not fit.
    """
    refuse_other_network(node, path)
    network: nn.Module = build(node, "network")
    load_weights(network, path)
    return network


def refuse_other_network(node: Mapping[str, Any], path: Path) -> None:
    """Checks that the network of a config node has the tensors of a file; allocates neither.

    Raises:
        UserError: it has other tensors, or cannot be built.
    """
    outside = not get_class(node, "network").__module__.startswith("cosyexp.")
    stored = stored_shapes(path)
    try:
        # a weight with a norm is registered three times, before and after the norm is added
        with limited_parameters(4 * len(stored) + 100, path), torch.device("meta"):
            network: nn.Module = build(node, "network")
    except UserError:
        raise
    except Exception:
        if outside:
            return  # code that the user trusts may need numbers to build its network
        raise
    expected = network.state_dict()
    refuse_other_shapes(shapes_of(expected), stored, path)
    extra = sum(b.nbytes for name, b in network.named_buffers() if name not in expected)
    if extra > BUFFERS:
        raise UserError(
            f"the network of {path} needs {extra / 2**30:.1f} GiB besides its weights: its config "
            f"is damaged, restore it"
        )


@contextmanager
def limited_parameters(limit: int, path: Path) -> Iterator[None]:
    """Ends the construction of a network within the block that gets more than `limit` parameters.

    Raises:
        UserError: it gets more.
    """
    count = 0

    def register(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise UserError(
                f"the network of this config has many more tensors than {path}: choose other "
                f"weights, or restore the config"
            )

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
