"""The export format peft: the adapter of a run alone, as peft reads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosyexp.config.names import ADAPTER
from cosyexp.errors import UserError
from cosyexp.exporting.export import refuse_parts
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.registry import register
from cosyexp.run.adapters import ADAPTER_CONFIG, adapter_note
from cosyexp.run.files import copy_file
from cosyexp.run.folders import staged_files


@register("format")
class Peft:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, for use with the base apart."""

    name = "peft"

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
        """Writes both files, and returns their paths; arguments as of `Format.export`.

        Raises:
            UserError: the weights are no adapter, do not fit their base, or components or another
                precision than fp32 are asked for.
        """
        refuse_parts(self.name, names, precision)
        config = source.weights.with_name(ADAPTER_CONFIG)
        if adapter_note(source.weights) is None or not config.is_file():
            raise UserError(
                f"{source.weights} is not the adapter of a run: choose a run with adapter=lora, or "
                f"another format"
            )
        load_network(source)  # refuses one that does not fit
        with staged_files(out, self.name) as part:
            copy_file(source.weights, part / ADAPTER)
            copy_file(config, part / ADAPTER_CONFIG)
        paths = [out / ADAPTER, out / ADAPTER_CONFIG]
        print(f"{paths[0]}: {paths[0].stat().st_size / 1e6:.1f} MB")
        return paths
