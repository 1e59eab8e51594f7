"""Spares a start half of its time in Hydra, which composes the config twice.

The first time it only looks up `hydra.mode`, which no config of cosyexp sets; -m and --run decide.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra._internal.hydra import Hydra

from cosyexp.cli.overrides import OVERLAYS

# A user's own config may set it: an experiment, or any group of a folder of theirs.
MAY_SET_MODE = ("-", "hydra", *(f"{overlay}=" for overlay in OVERLAYS))


@contextmanager
def composed_once(words: Sequence[str]) -> Iterator[None]:
    """Skips the look-up of `hydra.mode`, unless these arguments may lead to a config with it."""
    flags = {"-m", "--multirun", "-r", "--run"}
    if any(word.lstrip("+").startswith(MAY_SET_MODE) for word in words if word not in flags):
        yield
        return
    original, Hydra.get_mode = Hydra.get_mode, lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = original  # type: ignore[method-assign]
