"""The report on the quality of the recordings: `quality.tsv`, `report.json` and `report.html`."""

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cosyexp.data.encoding import audio_of, read_part
from cosyexp.data.features import read_wave
from cosyexp.data.frontends.base import SAMPLE_RATE
from cosyexp.data.quality import MEASURES, TAG
from cosyexp.errors import UserError
from cosyexp.pages import audio, write_page
from cosyexp.run.files import replace_file, write_json

BINS = 40  # of a histogram
WORST = 20
PLAYED = 10  # seconds of a recording that its player has
QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
TAGS = 1000  # different tags that are counted


class QualityReport:
    """The measures of all recordings, which are added one after another.

    As a context manager it also writes the table of all measures, which is complete, or absent, at
    the end.

    Args:
        path: of that table.

    Attributes:
        values: by measure, one per recording, NaN if it was not measured.
        used: whether each recording is used.
        usable: whether it would be used without the filter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = {name: array("f") for name in MEASURES}
        self.used, self.usable = array("b"), array("b")
        self.tags = Counter[str]()
        self._open = ExitStack()

    def __enter__(self) -> "QualityReport":
        self._file = self._open.enter_context(replace_file(self.path))
        self._write(["utt", "speaker", "fault", *MEASURES, "heard", "text"])
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)

    def _write(self, cells: Sequence[Any]) -> None:
        texts = ("" if c is None else f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells)
        line = "\t".join(re.sub(r"[\t\r\n]", " ", text) for text in texts)
        self._file.write(f"{line}\n".encode())

    def add(self, row: Mapping[str, Any], *, chosen: bool = True) -> None:
        """Adds one recording.

        Args:
            row: of a part, with the measures by name.
            chosen: False if it is left out by the filter.
        """
        numbers = [row.get(name) for name in MEASURES]
        self._write(
            [row["utt"], row["speaker"], row["fault"], *numbers, row.get("heard"), row["text"]]
        )
        for name, number in zip(MEASURES, numbers, strict=True):
            self.values[name].append(np.nan if number is None else number)
        self.used.append(not row["fault"])
        self.usable.append(not row["fault"] or not chosen)
        if len(self.tags) < TAGS:
            self.tags.update(TAG.findall(row["text"]))

    def summary(self) -> dict[str, Any]:
        """Returns quantiles and histograms of the measures, over all recordings that have them.

        The counts of a histogram are those of all recordings, and of those that are used.
        """
        found, used = {}, np.array(self.used, bool)
        for name, values in self.values.items():
            numbers = np.array(values)
            known = numbers[~np.isnan(numbers)]
            if len(known):
                points = np.quantile(known, list(QUANTILES.values()))
                edges = np.histogram_bin_edges(known, BINS)
                found[name] = {
                    "unit": MEASURES[name].unit,
                    "about": MEASURES[name].about,
                    **{q: float(f"{p:.4g}") for q, p in zip(QUANTILES, points, strict=True)},
                    "edges": edges[[0, -1]].tolist(),
                    "counts": np.histogram(known, edges)[0].tolist(),
                    "used": np.histogram(numbers[used], edges)[0].tolist(),
                }
        return found

    def suspicion(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns how far each recording is from the others, and in which measure.

        The distance from the median, in the direction that is bad, is counted in units of the
        median distance, or of the step that matters if that is larger.

        Returns:
            The largest such number of each recording, and the index of its measure.
        """
        scores = []
        for name, measure in MEASURES.items():
            numbers = np.array(self.values[name], np.float64)
            known = numbers[~np.isnan(numbers)]
            middle = np.median(known) if len(known) else 0.0
            spread = np.median(np.abs(known - middle)) if len(known) else 0.0
            score = (numbers - middle) / max(spread, measure.step)
            score = {"high": score, "low": -score, "both": np.abs(score)}[measure.bad]
            scores.append(np.nan_to_num(score, nan=-np.inf))
        return np.max(scores, axis=0), np.argmax(scores, axis=0)

    def worst(self, parts: Sequence[Path], name: str | None = None) -> list[dict[str, Any]]:
        """Returns the usable recordings that are furthest from the others, the worst first.

        Args:
            parts: files of the parts, all of whose recordings were added.
            name: of the measure to go by; None: all.
        """
        if name:
            score = np.nan_to_num(np.array(self.values[name]), nan=-np.inf)
            index = np.full(len(score), list(MEASURES).index(name))
        else:
            score, index = self.suspicion()
        score = np.where(np.array(self.usable, bool), score, -np.inf)
        ends = np.cumsum([0, *(len(read_part(part)) for part in parts)])
        found = []
        for at in np.argsort(-score, kind="stable")[:WORST].tolist():
            if score[at] <= 0:
                break
            number = int(np.searchsorted(ends, at, "right")) - 1
            (row,) = read_part(parts[number]).slice(at - ends[number], 1).to_pylist()
            measure = list(MEASURES)[index[at]]
            found.append(
                {
                    "utt": row["utt"],
                    "measure": measure,
                    "value": float(f"{self.values[measure][at]:.4g}"),
                    "unit": MEASURES[measure].unit,
                    "used": bool(self.used[at]),
                    "text": row["text"],
                    "heard": row["heard"],
                    "player": player(row),
                }
            )
        return found

    def write(self, out: Path, parts: Sequence[Path], facts: Mapping[str, Any]) -> None:
        """Writes `report.json` and `report.html`.

        Args:
            out: the folder.
            parts: files of the parts, all of whose recordings were added.
            facts: counts to show, by name.
        """
        measures, worst = self.summary(), self.worst(parts)
        misheard = self.worst(parts, "wer") if "wer" in measures else []
        tags = dict(self.tags.most_common(WORST))
        write_page(
            out / "report.html",
            "preparation.html",
            facts=facts,
            measures=measures,
            worst=worst,
            misheard=misheard,
            tags=tags,
        )
        lists = {"worst": worst, "misheard": misheard}
        write_json(
            out / "report.json",
            {
                **facts,
                "tags": tags,
                "measures": measures,
                **{
                    name: [{k: v for k, v in row.items() if k != "player"} for row in rows]
                    for name, rows in lists.items()
                },
            },
        )


def player(row: Mapping[str, Any]) -> str:
    """Returns the beginning of a recording for a player; empty if it cannot be decoded."""
    try:
        return audio(read_wave(audio_of(row), SAMPLE_RATE)[: PLAYED * SAMPLE_RATE], SAMPLE_RATE)
    except (ValueError, UserError):
        return ""
