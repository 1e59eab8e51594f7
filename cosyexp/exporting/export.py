"""Writes a run in a format, and proves what was written."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import Component, load_components
from cosyexp.exporting.verify import TOLERANCE, compare
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import write_json

log = logging.getLogger(__name__)


class Format(Protocol):
    """To export in another format, write one of these and a YAML in `conf/export/format/`."""

    name: str

    def export(self, run: RunDirectory, weights: Path, precision: str, names: Sequence[str] | None, out: Path) -> list[Path]:
        """Writes files and `report.<precision>.json` into `out`, and returns the files.

        names: the components, or None for all. Raises UserError where a file is not what the run computes; it is not kept.
        """
        ...


class ComponentFormat:
    """A format with a file for each component, `<component>.<precision>.<suffix>`."""

    name: str
    suffix: str

    def write(self, component: Component, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> Callable[..., tuple[Tensor, ...]]:
        """A function of the component's inputs, in order."""
        raise NotImplementedError

    def export(self, run: RunDirectory, weights: Path, precision: str, names: Sequence[str] | None, out: Path) -> list[Path]:
        components = load_components(run, weights)
        if unknown := sorted(set(names or ()) - components.keys()):
            raise UserError(f"{run} has no component {unknown[0]}: it has {', '.join(components)}")
        report, paths = {}, []
        for name in names or components:
            path = out / f"{name}.{precision}.{self.suffix}"
            with proven(path) as part:
                self.write(components[name], part)
                report[name] = compare(components[name], self.load(part))
                worst = max(report[name]["largest_error"].values())
                if worst > TOLERANCE:
                    raise UserError(f"{name} as {self.name} differs from PyTorch by {worst:.1e}, above {TOLERANCE}: it was not kept")
            report[name]["bytes"] = path.stat().st_size
            paths.append(path)
            log.info("%s: %.1f MB, differs by %.1e at most", path, path.stat().st_size / 1e6, worst)
        write_report(out, precision, weights, report)
        return paths


@contextmanager
def proven(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place if all goes well within."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_report(out: Path, precision: str, weights: Path, components: dict[str, Any]) -> None:
    write_json(out / f"report.{precision}.json", {"weights": str(weights), "components": components})
