"""Writes a model in a format, and proves what was written."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import Component, load_components, select_components
from cosyexp.exporting.report import merge_report, show
from cosyexp.exporting.source import ExportSource
from cosyexp.exporting.verify import TOLERANCES, compare, latencies
from cosyexp.run.files import sync, write_text

log = logging.getLogger(__name__)


class Format(Protocol):
    """To export in another format, write one of these and a YAML in `conf/export/format/`."""

    name: str

    def export(
        self,
        source: ExportSource,
        out: Path,
        *,
        precision: str = "fp32",
        names: Sequence[str] | None = None,
        timed: bool = False,
    ) -> list[Path]:
        """Writes files and `report.<precision>.json` into `out`, and returns the files.

        names: the components, or None for all that the format can. timed: whether their latencies are measured too.
        Raises UserError where a file is not what PyTorch computes; then all files stay as they were.
        """
        ...


class ComponentFormat:
    """A format with a file for each component, `<component>.<precision>.<suffix>`.

    Beside them lie `<model>.yaml` and `speakers.safetensors`: with these and the files alone, `synthesize` speaks.
    """

    name: str
    suffix: str

    def runtime(self) -> str:
        """What runs the files here, for the report."""
        raise NotImplementedError

    def write(self, component: Component, path: Path, precision: str = "fp32") -> None:
        raise NotImplementedError

    def load(self, path: Path, precision: str = "fp32") -> Callable[..., tuple[Tensor, ...]]:
        """A function of the component's inputs, in order, in fp32."""
        raise NotImplementedError

    def export(
        self,
        source: ExportSource,
        out: Path,
        *,
        precision: str = "fp32",
        names: Sequence[str] | None = None,
        timed: bool = False,
    ) -> list[Path]:
        found = select_components(source, names, self.name, precision)
        components, report = load_components(source, found), {}
        with staged(
            out, f"{'+'.join(names or [source.config['model']['name']])}.{precision}"
        ) as part:
            for name, component in components.items():
                path = part / self.file(name, precision)
                self.write(component, path, precision)
                made = {
                    "file": path.name,
                    "weights": str(source.weights),
                    "bytes": path.stat().st_size,
                }
                report[name] = {**made, **self.prove(component, path, name, precision)}
                if timed:
                    report[name]["milliseconds"] = latencies(component, self.load(path, precision))
            write_excerpt(source, part)
        whole = {
            "weights": str(source.weights),
            "runtime": self.runtime(),
            "threads": torch.get_num_threads(),
        }
        merge_report(out, precision, whole, report)
        show(precision, whole, report)
        return [out / self.file(name, precision) for name in components]

    def file(self, name: str, precision: str) -> str:
        return f"{name}.{precision}.{self.suffix}"

    def prove(self, component: Component, path: Path, name: str, precision: str) -> dict[str, Any]:
        measured = compare(component, self.load(path, precision), precision, path.name)
        worst = max(measured["largest_error"].values())
        said = f"{name} as {self.name} in {precision} differs from PyTorch by {worst:.1e}, above {TOLERANCES[precision]}"
        if not measured["passed"]:
            raise UserError(f"{said}: it was not kept")
        if worst > TOLERANCES[precision]:
            log.warning("%s, which is more than is usual: listen to it", said)
        return measured


@contextmanager
def staged(out: Path, job: str) -> Iterator[Path]:
    """A folder in `out` to write into, whose files move there if all goes well within. What a kill left of the same job is removed."""
    part = out / f".{job}.part"
    new = [path for path in (out, *out.parents) if not path.exists()]
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for path in sorted(part.iterdir()):
            sync(path)
            os.replace(path, out / path.name)
        sync(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # folders that are new stay where there is something in them
            for path in new:
                path.rmdir()


def write_excerpt(source: ExportSource, folder: Path) -> None:
    """What synthesis reads of a config, under the same names, and the speakers."""
    excerpt = {key: source.config[key] for key in ("family", "model", "components")}
    write_text(
        folder / f"{excerpt['model']['name']}.yaml",
        yaml.safe_dump(excerpt, sort_keys=False, allow_unicode=True),
    )
    if source.speakers is not None:
        shutil.copyfile(source.speakers, folder / source.speakers.name)
