"""Trainings of a small network with each engine; a module that a separate process imports."""

import copy
import io
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from cosyexp.objectives.base import Trainable
from cosyexp.training.engines.ddp import DDP
from cosyexp.training.engines.deepspeed import DeepSpeed
from cosyexp.training.engines.fsdp import FSDP

Content = dict[str, dict[str, torch.Tensor]]

ENGINES: dict[str, Any] = {"ddp": DDP, "fsdp": FSDP} | {
    f"zero{stage}": partial(DeepSpeed, stage=stage) for stage in range(4)
}
OPTIMIZERS: dict[str, Any] = {
    "fused AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01, fused=True),
    "Adam": partial(torch.optim.Adam, lr=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
SCALES = [1.0, math.nan, 0.5, math.inf, 2.0, 1.0]  # of the loss at each update
HALF = len(SCALES) // 2


class Block(nn.Module):
    """A residual layer with dropout, and weights that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.unused = nn.Linear(5, 5), nn.Dropout(0.3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


class Net(nn.Module):
    """Blocks, odd sizes, weights that are not used, and one that is not trained."""

    seen: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks, self.out = nn.ModuleList(Block() for _ in range(2)), nn.Linear(5, 3)
        self.out.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def engine_of(name: str, net: Net, optimizer: str, **options: Any) -> Any:
    """Returns an engine that is set up for a network."""
    engine = ENGINES[name](max_grad_norm=0.7, ema=0.5, running_sum=True, **options)
    engine.setup(
        {"net": Trainable(net, OPTIMIZERS[optimizer], lambda update, lr: lr / (update + 1))}, []
    )
    return engine


def update(engine: Any, net: Net, number: int, scale: float) -> Any:
    """Makes an update of two micro-batches, and returns its report."""
    for half in (0, 1):
        torch.manual_seed(2 * number + half)
        with engine.autocast():
            loss = (
                net(torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * number + half)))
                .float()
                .square()
                .mean()
            )
        engine.backward("net", loss * scale, last=half == 1)
    return engine.step("net", number)


def content(engine: Any) -> Content:
    """Returns copies of the weights and of their averages."""
    kept = {"net": engine.weights("net"), **engine.weight_averages()}
    return {
        name: {key: tensor.detach().clone() for key, tensor in tensors}
        for name, tensors in kept.items()
    }


def life(name: str, optimizer: str, resumed: bool = False, **options: Any) -> dict[str, Any]:
    """Makes some updates, a few of them not finite.

    Args:
        name: of the engine.
        optimizer: its name.
        resumed: whether everything goes through a file into a new engine halfway.
        options: of the engine.

    Returns:
        The content of the engine, and the gradient norm of each update and whether it was applied.
    """
    net = Net()
    engine, norms, applied = engine_of(name, net, optimizer, **options), [], []
    for number, scale in enumerate(SCALES):
        if resumed and number == HALF:
            with TemporaryDirectory() as own:
                saved, file = copy.deepcopy(content(engine)), io.BytesIO()
                folder = Path(engine.all_gather(own)[0])
                torch.save(engine.save_state(folder), file)
                engine.all_gather(None)
                engine.close()
                file.seek(0)
                net = Net(seed=5)
                engine = engine_of(name, net, optimizer, **options)
                engine.load(
                    {"net": saved.pop("net")}, saved, torch.load(file, weights_only=True), folder
                )
                engine.all_gather(None)
        report = update(engine, net, number, scale)
        norms.append(float(report.grad_norm))
        applied.append(bool(report.applied))
    found = {**content(engine), "norms": norms, "applied": applied}
    engine.close()
    return found


def lives(calls: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Returns the result of `life` for each of several options."""
    torch.set_num_threads(1)
    return {key: life(**options) for key, options in calls.items()}
