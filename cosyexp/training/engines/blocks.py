"""The parts of which a network is built many times over: what is compiled, sharded, or computed again in the backward, piece by piece."""

from collections.abc import Iterator

from torch import nn


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The members of a network's lists that are of one class of their own, the outermost of each nest: layers, residual blocks.

    A list of torch's own modules (convolutions, say) is no list of blocks, nor is one whose members are lists themselves.
    """
    for child in network.children():
        members = list(child.children())
        kinds = {type(member) for member in members}
        own = not any(
            kind.__module__.startswith("torch.") or issubclass(kind, nn.ModuleList)
            for kind in kinds
        )
        if isinstance(child, nn.ModuleList) and len(kinds) == 1 and own:
            yield from members
        else:
            yield from repeated_blocks(child)
