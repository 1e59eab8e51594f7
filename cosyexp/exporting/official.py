"""The export format official: the weights as in the official releases, for their runtime."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cosyexp.errors import UserError
from cosyexp.exporting.report import merge_report
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.registry import register
from cosyexp.run.files import create
from cosyexp.run.folders import staged_files


@register("format")
class Official:
    """Writes one file, `llm.pt`, `flow.pt` or `hift.pt`, with the state dict of the network."""

    name = "official"

    def export(
        self,
        source: ExportSource,
        out: Path,
        *,
        precision: str = "fp32",
        names: Sequence[str] | None = None,
        timed: bool = False,
        device: str = "cpu",
        node: dict[str, Any] | None = None,
    ) -> list[Path]:
        """Writes the file, and returns its path; arguments as of `Format.export`.

        Raises:
            UserError: components or another precision than fp32 are asked for, or the file does not
                hold what was written.
        """
        if names is not None:
            raise UserError(
                "format=official writes the whole model, not single components: leave "
                "components= out"
            )
        if precision != "fp32":
            raise UserError(
                f"format=official writes the weights as they are, not in {precision}: leave "
                f"precision= out"
            )
        tensors = load_network(source).state_dict()
        name = source.config.model.official
        path = out / f"{name}.pt"
        with staged_files(out, name) as part:
            # Written to memory first, as torch's writer aborts the process if the disk is full.
            content = io.BytesIO()
            torch.save(dict(tensors), content)
            with create(part / path.name) as file:
                file.write(content.getbuffer())
            written = torch.load(part / path.name, map_location="cpu", weights_only=True)
            if list(written) != list(tensors) or not all(
                torch.equal(written[name], tensors[name]) for name in tensors
            ):
                raise UserError(
                    f"{path} does not hold what was written, and was not kept: check the disk"
                )
        size = path.stat().st_size
        entry = {"file": path.name, "bytes": size, "tensors": len(tensors)}
        merge_report(out, precision, {"weights": str(source.weights)}, {name: entry})
        print(f"{path}: {size / 1e6:.1f} MB, {len(tensors)} tensors")
        return [path]
