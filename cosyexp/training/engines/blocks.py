"""Finds the repeated blocks of a network, which engines compile, shard or recompute one by one."""

from collections.abc import Iterator

from torch import nn


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the repeated blocks of a network, such as its transformer layers or residual blocks.

    They are the members of each `nn.ModuleList` whose members have the same class. Lists of torch's
    own modules, such as convolutions, and lists of lists are not counted. Of nested blocks only the
    outermost are yielded.
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
