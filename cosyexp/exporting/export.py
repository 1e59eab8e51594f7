"""Exports a model to a format, and verifies the files against PyTorch."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cosyexp.config import ExportedConfig, to_dict
from cosyexp.device import CPU, inference_device
from cosyexp.errors import UserError
from cosyexp.exporting.components import Component, load_components, select_components
from cosyexp.exporting.origin import exported_files, hashes, remember
from cosyexp.exporting.report import merge_report, show
from cosyexp.exporting.source import ExportSource
from cosyexp.exporting.verify import TOLERANCES, Function, compare, latencies
from cosyexp.run.directory import voice_files
from cosyexp.run.files import copy_file, write_yaml
from cosyexp.run.folders import staged_files

log = logging.getLogger(__name__)


class Format(Protocol):
    """Protocol of export formats.

    To add a format, write a class and a YAML in `conf/export/format/`.

    Attributes:
        name: of the format.
    """

    name: str

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
        """Writes files and `report.<precision>.json` into a folder, and returns the files.

        Args:
            source: the model.
            out: the folder.
            precision: of the files.
            names: of components; None for all that can be exported to the format.
            timed: measure latencies too.
            device: where the files are verified and timed, see `select_device`.
            node: config node of the format, kept for synthesis.

        Raises:
            UserError: the output of a file differs from PyTorch; the folder is then unchanged.
        """
        ...


class ComponentFormat:
    """Base class of formats with one file per component, `<component>.<precision>.<suffix>`.

    The folder also gets `<model>.yaml`, `speakers.safetensors` and the fitted front ends, so that
    `synthesize` needs no run. Subclasses define the attributes and override `runtime`, `write` and
    `load`.

    Attributes:
        name: of the format.
        suffix: of its files.
        precisions: that it supports.
    """

    name: str
    suffix: str
    precisions: tuple[str, ...] = ("fp32",)

    def device(self, choice: str) -> torch.device:
        """Returns where the files run for a key `device=`; "auto": a GPU if they can use one.

        Raises:
            UserError: there is no such device.
        """
        return inference_device(choice)

    def runtime(self, device: torch.device) -> str:
        """Returns the name and the version of what runs the files on a device, for the report."""
        raise NotImplementedError

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        """Writes a component to a file."""
        raise NotImplementedError

    def load(self, path: Path, precision: str = "fp32", device: torch.device = CPU) -> Function:
        """Loads a file.

        Returns:
            A function of the inputs of the component, in order, that returns its outputs; both are
            on the device, and fp32 in all precisions.
        """
        raise NotImplementedError

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
        """Writes components, and compares each with PyTorch on inputs of many sizes.

        Args and errors are those of `Format.export`.
        """
        selected = select_components(source, names, self.name, precision, self.precisions)
        place = self.device(device)
        components, report = load_components(source, selected), {}
        job = f"{'+'.join(names or [source.config.model.name])}.{precision}"
        with staged_files(out, job) as part:
            for name, component in components.items():
                path = part / self.file(name, precision)
                self._write(component, path, name, precision)
                written = hashes(path)
                exported = self.load(path, precision, place)
                report[name] = {
                    "file": path.name,
                    "weights": str(source.weights),
                    "bytes": sum(file.stat().st_size for file in exported_files(path)),
                    "sha256": written,
                    **self._verify(component, exported, name, precision, place),
                }
                if timed:
                    report[name]["milliseconds"] = latencies(component, exported, place)
            write_excerpt(source, part, node)
            remember(value for entry in report.values() for value in entry["sha256"].values())
        whole = {
            "weights": str(source.weights),
            "runtime": self.runtime(place),
            "device": str(place),
            "threads": torch.get_num_threads(),
        }
        merge_report(out, precision, whole, report)
        show(precision, whole, report)
        return [out / self.file(name, precision) for name in components]

    def file(self, name: str, precision: str) -> str:
        """Returns the file name of a component."""
        return f"{name}.{precision}.{self.suffix}"

    def _write(self, component: Component, path: Path, name: str, precision: str) -> None:
        try:
            self.write(component, path, precision)
        except (UserError, OSError):
            raise
        except Exception as error:  # each exporter raises its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{name} cannot be exported as format={self.name} ({reason}): choose another "
                f"format or components=, or see the whole error with HYDRA_FULL_ERROR=1"
            ) from error

    def _verify(
        self,
        component: Component,
        exported: Function,
        name: str,
        precision: str,
        device: torch.device,
    ) -> dict[str, Any]:
        measured = compare(component, exported, precision, self.file(name, precision), device)
        worst = max(measured["largest_error"].values())
        message = (
            f"{name} as {self.name} in {precision} differs from PyTorch by {worst:.1e}, more than "
            f"{TOLERANCES[precision]}"
        )
        if not measured["passed"]:
            raise UserError(f"{message}, and was not kept: choose another precision or format")
        if worst > TOLERANCES[precision]:
            log.warning("%s, which is unusual: listen to it", message)
        return measured


def refuse_parts(form: str, names: Sequence[str] | None, precision: str) -> None:
    """Checks what is asked of a format that writes the weights of a whole model.

    Raises:
        UserError: components or another precision than fp32 are asked for.
    """
    if names is not None:
        raise UserError(
            f"format={form} writes the whole model, not single components: leave components= out"
        )
    if precision != "fp32":
        raise UserError(
            f"format={form} writes the weights as they are, not in {precision}: leave precision= "
            f"out"
        )


def write_excerpt(source: ExportSource, folder: Path, node: dict[str, Any] | None) -> None:
    """Writes what synthesis reads besides: `<model>.yaml`, the speakers and the front ends.

    Args:
        source: the model.
        folder: to write to.
        node: config node of the format, from which synthesis builds it again.
    """
    config = source.config
    excerpt = to_dict(ExportedConfig(config.family, config.model, config.components))
    excerpt["format"] = node or {}
    write_yaml(folder / f"{config.model.name}.yaml", excerpt)
    if source.speakers is not None:
        for name, file in voice_files(source.speakers).items():
            copy_file(file, folder / name)
