"""examples/mylab: a package outside of cosyexp that adds one of each kind, as in its README."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosyexp.data.draws import keyed
from tests.apps.warm import Warm
from tests.support import ROOT, environment, metrics, sentence
from tests.tones import tone

EXAMPLE = ROOT / "examples" / "mylab"
FLAGS = ["--config-dir", "mylab/conf", "trusted=[mylab]"]
TRAIN = [
    "network=llm_gru",
    "objective=focal",
    "engine=counting",
    "scheduler=cosine",
    "scheduler.steps=6",
    "scheduler.warmup=2",
    "callbacks=token_budget",
    "logger=[jsonl,markdown]",
    "metrics=entropy",
    "data=prepared",
    "data.dir=data/mine",
    "data.max_frames=300",
    "trainer.valid_every=2",
    "trainer.log_every=1",
]


def write_wavs(folder: Path) -> None:
    """Two speakers with a dozen tones each, and a text next to each."""
    for speaker in ("a", "b"):
        (folder / speaker).mkdir(parents=True)
        for i in range(12):
            draw = keyed("mylab", speaker, i)
            path = folder / speaker / f"{i:02d}.wav"
            path.write_bytes(tone(float(draw.uniform(0.8, 1.5)), draw))
            text = "".join(draw.choice(list("abc def"), size=8)).strip() or "a"
            path.with_suffix(".txt").write_text(text)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A folder with recordings, and mylab copied into it; prepared by mylab's corpus."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(EXAMPLE / "mylab", folder / "mylab")
    write_wavs(folder / "wavs")
    corpus = ["corpus=text_beside", "corpus.root=wavs", "speech_tokenizer.codes=64"]
    said = warm("prepare", *FLAGS, *corpus, "processes=1", "out=data/mine", cwd=folder).stdout
    assert "data/mine: 24 utterances" in said and "2 speakers" in said
    return folder


@pytest.fixture(scope="module")
def run(lab: Path, warm: Warm) -> Path:
    """A run that uses one of each, stopped after three steps and resumed to six."""
    for steps in (3, 6):
        words = [*TRAIN, f"trainer.steps={steps}", "run_dir=run"]
        said = warm("train", *FLAGS, *words, cwd=lab)
        assert "mylab: 3 updates on rank 0" in said.stdout
    return lab / "run"


def test_network_objective_engine_schedule_and_metric_train(run):
    lines = metrics(run)
    assert {"valid/focal", "valid/entropy"} <= lines[0].keys()
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    assert len(rates) == 6 and rates[-1] < rates[2]  # the cosine goes down


def test_callback_and_logger_survive_a_resume(run, lab, warm):
    warm("train", *FLAGS, *TRAIN, "trainer.steps=6", "run_dir=straight", cwd=lab)
    counted = [
        [line["mylab/tokens"] for line in metrics(folder) if "mylab/tokens" in line]
        for folder in (run, lab / "straight")
    ]
    assert counted[0] == counted[1] and len(counted[0]) == 6
    table = (run / "losses.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {i}" for i in range(1, 7)]


def test_a_callback_ends_the_run_and_stays_ended(lab, warm):
    words = [*TRAIN, "trainer.steps=6", "callbacks.token_budget.tokens=200", "run_dir=short"]
    assert "done at step" in warm("train", *FLAGS, *words, cwd=lab).stdout
    ended = metrics(lab / "short")[-1]
    assert ended["step"] < 6 and "valid/loss" in ended
    warm("train", *FLAGS, *words, cwd=lab)
    assert metrics(lab / "short")[-1] == ended
    more = [word.replace("=200", "=1e9") for word in words]
    warm("train", *FLAGS, *more, cwd=lab)
    assert metrics(lab / "short")[-1]["step"] == 6


def test_a_run_may_go_on_without_its_callbacks_loggers_and_metrics(lab, warm):
    words = [*TRAIN, "run_dir=bare"]
    warm("train", *FLAGS, *words, "trainer.steps=1", cwd=lab)
    bare = ["callbacks=none", "logger=jsonl", "metrics=none", "trainer.steps=2"]
    warm("train", *FLAGS, *words, *bare, cwd=lab)
    assert metrics(lab / "bare")[-1]["step"] == 2
    assert "| 2 |" not in (lab / "bare/losses.md").read_text()


def test_the_method_averages_and_the_format_exports(run, lab, warm):
    said = warm("average", *FLAGS, "run_dir=run", "num=3", "method=ramp", cwd=lab).stdout
    assert [line.split()[-1] for line in said.splitlines()[1:4]] == ["0.167", "0.333", "0.500"]
    words = ["run_dir=run", "format=traced", "weights=average", "latency=false"]
    warm("export", *FLAGS, *words, cwd=lab)
    report = json.loads((run / "exports/traced/report.fp32.json").read_text())
    assert report["components"]["llm.next_token"]["passed"]
    excerpt = yaml.safe_load((run / "exports/traced/llm.yaml").read_text())
    assert excerpt["format"] == {"_target_": "mylab.export.Traced"}


def test_a_run_does_not_say_what_is_trusted(run, lab, warm):
    assert "trusted" not in (run / "config.yaml").read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "trusted": ["mylab"]}))
    refused = warm("export", "run_dir=run", "format=onnx", cwd=lab, check=False)
    sentence(refused, "mylab.network.NextToken is not a registered component", "trusted=[mylab]")


def test_a_package_that_is_not_there_is_named(lab, warm):
    refused = warm("train", "trusted=[yourlab]", cwd=lab, check=False)
    sentence(refused, "trusted=[yourlab]", "cannot be imported")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process in which mylab is installed, by its pyproject.toml."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(site)]
    made = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(EXAMPLE)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    yield {**environment(), "PYTHONPATH": f"{site}:{ROOT}"}


def composed(app: str, *words: str, env: dict[str, str], cwd: Path) -> Any:
    """What `--cfg job` prints."""
    said = subprocess.run(
        [sys.executable, "-m", f"cosyexp.{app}", *words, "--cfg", "job"],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    return yaml.safe_load(said.stdout)


def test_an_installed_package_needs_neither_flag(installed, lab, tmp_path):
    config = composed("train", "network=llm_gru", "callbacks=token_budget", env=installed, cwd=lab)
    assert config["network"]["_target_"] == "mylab.network.GRULM"
    config = composed("export", "format=traced", env=installed, cwd=tmp_path)
    assert config["format"]["_target_"] == "mylab.export.Traced"
    words = [*TRAIN, "trainer.steps=1", f"run_dir={tmp_path}/run", f"data.dir={lab}/data/mine"]
    trained = subprocess.run(
        [sys.executable, "-m", "cosyexp.train", *words],
        cwd=tmp_path,
        env=installed,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    assert "mylab: 1 updates on rank 0" in trained.stdout
