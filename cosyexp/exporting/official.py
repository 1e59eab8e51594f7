"""The weights of a run as the official releases have them, for the official runtime."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cosyexp.errors import UserError
from cosyexp.exporting.export import proven, write_report
from cosyexp.run.directory import RunDirectory
from cosyexp.run.targets import build
from cosyexp.run.weights import load_weights

log = logging.getLogger(__name__)


class Official:
    """One file, `llm.pt`, `flow.pt` or `hift.pt`: every tensor under its name, in the network's order, and nothing else."""

    name = "official"

    def export(self, run: RunDirectory, weights: Path, precision: str, names: Sequence[str] | None, out: Path) -> list[Path]:
        config = run.config()
        if names is not None:
            raise UserError("format=official writes the whole model, no single components: leave components= out")
        network: nn.Module = build(config["network"])
        load_weights(network, weights)
        tensors = network.state_dict()
        path = out / f"{config['model']['official']}.pt"
        with proven(path) as part:
            content = io.BytesIO()  # where the disk is full, torch's own writer ends the process
            torch.save(dict(tensors), content)
            part.write_bytes(content.getbuffer())
            written = torch.load(part, map_location="cpu", weights_only=True)
            if list(written) != list(tensors) or not all(torch.equal(written[name], tensors[name]) for name in tensors):
                raise UserError(f"{path} did not come back as it was written: it was not kept")
        write_report(out, precision, weights, {config["model"]["official"]: {"tensors": len(tensors), "bytes": path.stat().st_size}})
        log.info("%s: %.1f MB, %d tensors", path, path.stat().st_size / 1e6, len(tensors))
        return [path]
