"""The report of an export: the file `report.<precision>.json` and a table on the console."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosyexp.errors import UserError
from cosyexp.exporting.verify import FRAMES
from cosyexp.run.documents import Fields, read_json
from cosyexp.run.files import below, write_json


def merge_report(
    out: Path, precision: str, whole: Mapping[str, Any], components: Mapping[str, Any]
) -> None:
    """Writes `report.<precision>.json`, keeping the entries of components exported before.

    An entry is kept if its file still exists.

    Args:
        out: folder of the export.
        precision: of the export, a part of the file name.
        whole: entries that concern all components.
        components: an entry for each component that was exported now, by name.
    """
    before = read_report(out, precision)
    kept = {name: entry for name, entry in before.items() if (out / entry["file"]).is_file()}
    path = below(out, f"report.{precision}.json")
    write_json(path, {**whole, "components": {**kept, **components}})


def read_report(out: Path, precision: str) -> dict[str, dict[str, Any]]:
    """Returns the entry of each component in a report; empty if there is none, or it is damaged.

    Args:
        out: folder of the export.
        precision: of the export.
    """
    path = below(out, f"report.{precision}.json")
    try:
        components = Fields(read_json(path), path).inner("components")
        entries = {name: components.inner(name) for name in components.content}
        files = {name: below(out, entry.text("file")).name for name, entry in entries.items()}
    except (OSError, UserError):
        return {}
    return {name: {**entry.content, "file": files[name]} for name, entry in entries.items()}


def show(precision: str, whole: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    """Prints a table with a line for each component.

    Latencies are in milliseconds: those of PyTorch / those of the exported file.
    """
    timed = any("milliseconds" in entry for entry in components.values())
    rows = [
        ["component", "precision", "MB", "error", *(f"ms at {size}" for size in FRAMES if timed)]
    ]
    for name, entry in components.items():
        times = [
            f"{at['torch']:.1f} / {at['exported']:.1f}"
            for at in entry.get("milliseconds", {}).values()
        ]
        worst = max(entry["largest_error"].values())
        rows.append([name, precision, f"{entry['bytes'] / 1e6:.1f}", f"{worst:.1e}", *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"PyTorch against {whole['runtime']}, threads: {whole['threads']}")
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
