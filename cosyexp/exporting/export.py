"""Writes the components of a run in a format, and proves each of them."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import Component, load_components
from cosyexp.exporting.verify import TOLERANCE, compare
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import write_json
from cosyexp.run.weights import find_weights

log = logging.getLogger(__name__)


class Format(Protocol):
    """To export in another format, write one of these and a YAML in `conf/export/format/`."""

    name: str
    suffix: str

    def write(self, component: Component, path: Path) -> None: ...

    def load(self, path: Path) -> Callable[..., tuple[Tensor, ...]]: ...


def export(run: RunDirectory, form: Format, weights: str, precision: str, names: Sequence[str] | None, out: Path) -> list[Path]:
    """Writes `<out>/<component>.<precision>.<suffix>` and `report.<precision>.json`; returns the files.

    names: the components, or None for all. Raises UserError where an exported file computes something else than PyTorch.
    """
    source = find_weights(run, weights)
    components = load_components(run, source)
    unknown = sorted(set(names or ()) - components.keys())
    if unknown:
        raise UserError(f"{run} has no component {unknown[0]}: it has {', '.join(components)}")
    out.mkdir(parents=True, exist_ok=True)
    log.info("exporting %s", source)
    report, paths = {}, []
    for name in names or components:
        path = out / f"{name}.{precision}.{form.suffix}"
        part = path.with_name(f".{path.name}")
        try:
            form.write(components[name], part)
            found = compare(components[name], form.load(part))
            worst = max(found["largest_error"].values())
            if worst > TOLERANCE:
                raise UserError(f"{name} as {form.name} differs from PyTorch by {worst:.1e}, above {TOLERANCE}: it was not kept")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        report[name] = {**found, "bytes": path.stat().st_size}
        paths.append(path)
        log.info("%s: %.1f MB, differs by %.1e at most", path, path.stat().st_size / 1e6, worst)
    write_json(out / f"report.{precision}.json", {"weights": str(source), "components": report})
    return paths
