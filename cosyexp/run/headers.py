"""Names and shapes of a file of weights, which are compared with a network before it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.run.adapters import adapter_note, find_base
from cosyexp.run.archives import Stub, scan_archive
from cosyexp.run.pickles import state_dict_in
from cosyexp.run.tensors import TensorFile

Shapes = Mapping[str, tuple[int, ...] | None]  # None: of a tensor without plain numbers

# names of torch's older weight norm, which the official checkpoints have
LEGACY = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def stored_shapes(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Returns the shapes of the model in a file of weights, under our names.

    Those of an adapter are the shapes of its base.

    Raises:
        UserError: the file is missing, damaged, or holds no tensors.
    """
    try:
        if note := adapter_note(path):
            return stored_shapes(find_base(path, note))
        if path.suffix == ".safetensors":
            with TensorFile(path) as file:
                content: Any = {name: file.stub(name) for name in file.keys()}  # noqa: SIM118
        else:
            content = scan_archive(path).content
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist: check the path") from None
    found = {our_name(n): t for n, t in state_dict_in(content, path, quiet=True).items()}
    return {
        name: tuple(stub.shape) if isinstance(stub, Stub | Tensor) else None
        for (network, name), stub in found.items()
        if network == "model"
    }


def our_name(name: str) -> tuple[str, str]:
    """Translates the name of a tensor in a checkpoint of the original CosyVoice.

    Returns:
        The network that the tensor belongs to ("model" or "discriminator"), and the name of the
        tensor in that network, with weight norms as parametrizations.
    """
    network = "discriminator" if name.startswith("discriminator.") else "model"
    name = name.removeprefix("generator.").removeprefix("discriminator.")
    for legacy, modern in LEGACY.items():
        if name.endswith(f".{legacy}"):
            name = f"{name.removesuffix(legacy)}{modern}"
    return network, name


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Returns the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_misfit(network: nn.Module, path: Path) -> None:
    """Checks that a file has the names and shapes of a network; its numbers are not read.

    Raises:
        UserError: it has not, or cannot be read.
    """
    refuse_other_shapes(shapes_of(network.state_dict()), stored_shapes(path), path)


def refuse_other_shapes(expected: Shapes, found: Shapes, path: Path) -> None:
    """Checks that two sets of names and shapes are equal.

    Args:
        expected: of the network.
        found: of the file.
        path: the file, for the message.

    Raises:
        UserError: they differ, or are empty.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    common = [name for name in expected if name in found]
    mismatched = [n for n in common if found[n] is not None and expected[n] != found[n]]
    shapes = [
        f"{name}, {list(found[name] or ())} instead of {list(expected[name] or ())}"
        for name in mismatched[:1]
    ]
    kinds = (
        ("missing", missing, missing),
        ("unknown", unknown, unknown),
        ("of another shape", mismatched, shapes),
    )
    problems = [
        f"{len(names)} {kind} (such as {example[0]})" for kind, names, example in kinds if names
    ]
    if problems or not common:
        raise UserError(f"the tensors of {path} do not fit the network: {', '.join(problems)}")
