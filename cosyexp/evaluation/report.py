"""Writes an evaluation: a JSON file, a table of all utterances, and a page to listen to.

<out>/evaluation.json   the mean of each metric, with its interval, by system
      utterances.csv    a row for each utterance and system
      evaluation.html   the worst utterances, with players and mel spectrograms
      timing.json       what depends on the clock: the other files are the same if it is repeated
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosyexp.evaluation.evaluate import Evaluation
from cosyexp.evaluation.evaluator import Sample
from cosyexp.evaluation.scores import Summary
from cosyexp.pages import audio, picture, write_page
from cosyexp.run.files import write_json, write_text
from cosyexp.run.folders import staged_files

PAGE = "evaluation.html"


def write_report(evaluation: Evaluation, out: Path) -> Path:
    """Writes all files into a folder, and returns the path of the page."""
    with staged_files(out, "evaluation") as part:
        write_json(part / "evaluation.json", content(evaluation))
        write_text(part / "utterances.csv", utterances(evaluation))
        factors = {name: s._asdict() for name, s in evaluation.real_time_factors().items()}
        write_json(part / "timing.json", {"threads": torch.get_num_threads(), "rtf": factors})
        write_evaluation_page(evaluation, part / PAGE)
    return out / PAGE


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Returns what evaluation.json holds."""
    return {
        "models": evaluation.about,
        "valid": evaluation.valid,
        "seed": evaluation.seed,
        "left_out": evaluation.left_out,
        "systems": {
            system: {metric: summary._asdict() for metric, summary in by_metric.items()}
            for system, by_metric in evaluation.summaries().items()
        },
    }


def utterances(evaluation: Evaluation) -> str:
    """Returns a row for each utterance and system, as CSV."""
    metrics = dict.fromkeys(metric for row in evaluation.rows for metric in row.scores)
    notes = dict.fromkeys(note for row in evaluation.rows for note in row.notes)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["utt", "system", *metrics, "text", *notes])
    for row in evaluation.rows:
        values = [row.scores[name].value if name in row.scores else "" for name in metrics]
        texts = [row.notes.get(name, "") for name in notes]
        writer.writerow([row.utt, row.system, *values, row.text, *texts])
    return file.getvalue()


def table(systems: Mapping[str, Mapping[str, Summary]]) -> list[list[str | None]]:
    """Returns a row for each metric, with its mean and interval by system; the first row has names.

    Args:
        systems: the summaries, by system and metric.
    """
    metrics = dict.fromkeys(metric for by_metric in systems.values() for metric in by_metric)
    rows: list[list[str | None]] = [["metric", *systems]]
    for metric in metrics:
        found = [by_metric.get(metric) for by_metric in systems.values()]
        cells = [x and f"{x.mean:.4g} [{x.low:.4g}, {x.high:.4g}]" for x in found]
        rows.append([metric, *cells])
    return rows


def write_evaluation_page(evaluation: Evaluation, path: Path) -> None:
    """Writes the page of the worst utterances."""
    rate = evaluation.sample_rate
    shown = [
        {
            "truth": truth,
            "mels": mel_picture(samples),
            "samples": {
                system: {
                    "audio": None if sample.wave_S is None else audio(sample.wave_S, rate),
                    "scores": {name: f"{x.value:.4g}" for name, x in sample.scores.items()},
                    "notes": sample.notes,
                }
                for system, sample in samples.items()
            },
        }
        for truth, samples in evaluation.shown
    ]
    write_page(
        path,
        PAGE,
        table=table(evaluation.summaries()),
        utterances=len({row.utt for row in evaluation.rows}),
        evaluation=evaluation,
        shown=shown,
    )


def mel_picture(samples: Mapping[str, Sample]) -> str:
    """Returns the mel spectrograms of all systems that make one, side by side, as an image."""
    from matplotlib.figure import Figure

    mels = {name: sample.mel_FT for name, sample in samples.items() if sample.mel_FT is not None}
    figure = Figure(figsize=(3.2 * len(mels), 2.0), layout="constrained")
    panels = figure.subplots(1, len(mels), sharey=True, squeeze=False)[0]
    low, high = min(mel.min() for mel in mels.values()), max(mel.max() for mel in mels.values())
    for panel, (name, mel_FT) in zip(panels, mels.items(), strict=True):
        panel.imshow(mel_FT, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="inferno")
        panel.set_xlim(0, max(mel.shape[1] for mel in mels.values()))
        panel.set_title(name, fontsize=9)
        panel.set_axis_off()
    return picture(figure)
