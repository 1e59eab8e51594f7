"""Curves of runs, from their `metrics.jsonl`, and a picture of several runs side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import Fields, read_json_lines, read_yaml
from cosyexp.run.files import replace_file

SPEED = "time/samples_per_second"
FEW = 30  # points; so few are marked
DPI = 110


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


class RunCurves(NamedTuple):
    """What a run logged.

    Attributes:
        name: of the run, as it was given.
        overrides: the words of its command line.
        steps: its last step.
        curves: the finite values of each key, such as valid/loss, in the order of steps.
    """

    name: str
    overrides: list[str]
    steps: int
    curves: dict[str, list[Point]]

    def best(self, key: str, mode: str) -> Point | None:
        """Returns the lowest (mode min) or highest (max) value of a key; None if it has none."""
        choose = max if mode == "max" else min
        return choose(self.curves.get(key, []), key=lambda point: point.value, default=None)

    def at(self, key: str, step: int) -> float | None:
        """Returns the value of a key at a step, if there is one."""
        return next((point.value for point in self.curves.get(key, []) if point.step == step), None)

    def speed(self) -> float | None:
        """Returns the median of the logged utterances per second, if there are any."""
        values = [point.value for point in self.curves.get(SPEED, [])]
        return median(values) if values else None


def read_curves(folder: str) -> RunCurves:
    """Reads what a run logged.

    Raises:
        UserError: the folder is not a run, or has no metrics.
    """
    run = RunDirectory(Path(folder).expanduser())
    run.config()  # refuses what is not a run
    words = run.path / "overrides.yaml"
    overrides = read_yaml(words) if words.exists() else []
    steps, curves = 0, dict[str, list[Point]]()
    if run.metrics.exists():
        for _, values in read_json_lines(run.metrics):
            step = Fields(values, run.metrics).whole("step")
            steps = max(steps, step)
            for key, value in values.items():
                if key not in ("step", "epoch") and isinstance(value, int | float):
                    curves.setdefault(key, []).append(Point(step, float(value)))
    finite = {
        key: [point for point in points if math.isfinite(point.value)]
        for key, points in curves.items()
    }
    if not any(finite.values()):
        raise UserError(
            f"{folder} has no metrics (in {run.metrics.name}): train it, or leave it out"
        )
    return RunCurves(folder, [str(word) for word in overrides], steps, finite)


def plot(runs: Sequence[RunCurves], path: Path) -> None:
    """Draws the training loss and every validation value, with one line per run, as a PNG file."""
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for run in runs for key in run.curves if run.curves[key]))
    shown = ["train/loss", *(key for key in keys if key.startswith("valid/"))]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows + 0.25 * len(runs)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, key in zip(panels, shown, strict=False):
        for number, run in enumerate(runs):
            points = run.curves.get(key, [])
            marker = "." if len(points) < FEW else ""
            values = [point.value for point in points]
            panel.plot([point.step for point in points], values, color=f"C{number}", marker=marker)
        panel.set(title=key, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    handles = panels[0].get_lines()
    figure.legend(handles, [run.name for run in runs], loc="outside lower left")
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
