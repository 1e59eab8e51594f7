"""What an export found out: `report.<precision>.json`, and a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosyexp.exporting.verify import FRAMES
from cosyexp.run.files import write_json


def merge_report(
    out: Path, precision: str, whole: Mapping[str, Any], components: Mapping[str, Any]
) -> None:
    """Writes `report.<precision>.json`; of components that were exported before and are still there, it keeps what it said."""
    path = out / f"report.{precision}.json"
    try:
        before = json.loads(path.read_text())["components"]
        kept = {name: entry for name, entry in before.items() if (out / entry["file"]).exists()}
    except (OSError, ValueError, TypeError, KeyError):
        kept = {}
    write_json(path, {**whole, "components": {**kept, **components}})


def show(precision: str, whole: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    """Prints a line for each component; latencies are milliseconds of PyTorch / of the runtime."""
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
