"""The compare app: a table of runs, and a picture of their curves."""

import json
import re
from pathlib import Path

import matplotlib.image
import pytest

from tests.apps.warm import Warm
from tests.support import metrics, sentence, train_words


@pytest.fixture(scope="module")
def runs(data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in the learning rate, `slow` and `fast`."""
    folder = tmp_path_factory.mktemp("compared")
    for name, lr in (("slow", "1e-5"), ("fast", "1e-2")):
        words = train_words("llm", data, "trainer.steps=6", "trainer.valid_every=2")
        warm("train", *words, f"optimizer.lr={lr}", f"run_dir={name}", cwd=folder)
    return folder


def rows(output: str) -> list[dict[str, str]]:
    """Returns the printed table; columns are two spaces or more apart."""
    lines = [line for line in output.splitlines() if line.startswith(("run ", "slow", "fast"))]
    starts = [0, *(gap.end() for gap in re.finditer("  +", lines[0]))]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        for line in lines
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def test_the_table_has_the_best_of_each_run_and_what_differs(runs, warm):
    for mode, choose in (("min", min), ("max", max)):
        output = warm("compare", "run_dir=slow,fast", f"metric_mode={mode}", cwd=runs).stdout
        slow, fast = rows(output)
        assert (slow["overrides"], fast["overrides"]) == (
            "optimizer.lr=1e-5 run_dir=slow",
            "optimizer.lr=1e-2 run_dir=fast",
        )
        for row in (slow, fast):
            lines = [line for line in metrics(runs / row["run"]) if "valid/loss" in line]
            best = choose(lines, key=lambda line: line["valid/loss"])
            assert (row["steps"], row["at step"]) == ("6", str(best["step"]))
            assert float(row["best valid/loss"]) == pytest.approx(best["valid/loss"], rel=1e-5)
            assert float(row["valid/acc"]) == pytest.approx(best["valid/acc"], rel=1e-5)
            assert float(row["utterances/s"]) > 0


def test_the_picture_has_a_line_of_each_run(runs, warm, tmp_path):
    out = tmp_path / "curves.png"
    for names in (["slow"], ["fast"], ["slow", "fast"]):
        warm("compare", f"run_dir={','.join(names)}", f"out={out}", cwd=runs)
        pixels = matplotlib.image.imread(out)[..., :3].reshape(-1, 3).round(2)
        assert len(pixels) > 100_000
        # the first two colours of matplotlib
        for number, colour in enumerate(([0.12, 0.47, 0.71], [1.0, 0.5, 0.05])):
            drawn = int((abs(pixels - colour).max(axis=1) < 0.02).sum())
            assert (drawn > 200) == (number < len(names))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["run_dir= is empty", "run_dir=a,b"]),
        (["run_dir=slow,slow"], ["slow twice"]),
        (["run_dir=slow,gone"], ["gone is not a run directory"]),
        (["run_dir=slow", "metric=wer"], ["no run has the metric wer", "loss"]),
        (["run_dir=slow,empty"], ["empty has no metrics"]),
    ],
)
def test_refused(words, parts, runs, warm, tmp_path):
    empty = runs / "empty"
    empty.mkdir(exist_ok=True)
    (empty / "config.yaml").write_bytes((runs / "slow" / "config.yaml").read_bytes())
    out = tmp_path / "out.png"
    sentence(warm("compare", *words, f"out={out}", cwd=runs, check=False), *parts)
    assert not out.exists()


def test_a_value_that_is_not_finite_is_never_the_best(runs, warm):
    path = runs / "slow" / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"step": 7, "epoch": 1, "valid/loss": None}) + "\n")
    try:
        (slow,) = rows(warm("compare", "run_dir=slow", cwd=runs).stdout)
    finally:
        path.write_text(before)
    assert slow["steps"] == "7" and slow["at step"] != "7"
