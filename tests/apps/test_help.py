"""What the apps say of themselves, and how fast."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT, command, environment

# the groups and keys that a help must name
APPS = {
    "train": [
        "family=",
        "model=llm|flow|hifigan",
        "mode=",
        "engine=ddp|fsdp|deepspeed",
        "data=",
        "run_dir=",
        "init_from=",
    ],
    "prepare": [
        "corpus=demo|ljspeech|libritts|kaldi|table",
        "speech_tokenizer=",
        "speaker_encoder=",
        "family=",
        "out=",
        "inspect=",
    ],
    "average": ["run_dir=", "select=best|last", "num=", "metric=", "output="],
    "export": [
        "format=onnx|jit|pt2",
        "run_dir=",
        "weights=",
        "precision=",
        "components=",
        "out=",
        "family=",
    ],
    "synthesize": [
        "text=",
        "llm=",
        "flow=",
        "hifigan=",
        "exports=",
        "out=",
        "speaker=",
        "backend=",
        "seed=",
    ],
    "prefer": [
        "run_dir=",
        "data=demo|prepared|parquet",
        "out=",
        "candidates=",
        "score=none|edit",
        "weights=",
        "limit=",
        "seed=",
    ],
}
WITHOUT_TORCH = """
import sys
from cosyexp.{app} import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def script(app: str) -> str:
    return str(Path(sys.executable).with_name(f"cosyexp-{app}"))


@pytest.mark.parametrize("app", APPS)
def test_help_names_the_keys_gives_examples_and_answers_within_a_second(app, tmp_path):
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        said = command(app, "--help", cwd=tmp_path).stdout
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1
    assert [word for word in APPS[app] if word not in said] == []
    assert (
        len([line for line in said.splitlines() if line.startswith(f"  python -m cosyexp.{app}")])
        == 3
    )
    assert max(map(len, said.splitlines())) <= 140
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("app", APPS)
def test_help_needs_no_torch(app, tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(app=app), "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (said.returncode, said.stderr) == (0, "False\n")


@pytest.mark.parametrize("app", APPS)
def test_the_composed_config_is_shown_without_torch(app, tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(app=app), "--cfg", "job"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (said.returncode, said.stderr) == (0, "False\n")
    assert isinstance(yaml.safe_load(said.stdout), dict)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["trainer.stepz=1"], ["data=parquet"]])
def test_a_wrong_word_is_refused_without_torch(words, tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(app="train"), *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    first, second = said.stderr.splitlines()
    assert said.returncode == 1 and first == "False" and second.startswith("cosyexp: ")


def test_every_app_has_a_console_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    doors = {
        path.stem for path in (ROOT / "cosyexp").glob("*.py") if "@hydra_app(" in path.read_text()
    }
    assert doors == set(APPS)
    assert scripts == {f"cosyexp-{app}": f"cosyexp.{app}:main" for app in doors}


def test_a_console_script_installs_tab_completion(tmp_path):
    said = subprocess.run(
        [script("train"), "-sc", "install=bash"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (
        said.returncode == 0
        and "complete " in said.stdout
        and said.stdout.rstrip().endswith("cosyexp-train")
    )
    checked = subprocess.run(["bash", "-n"], input=said.stdout, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train model=", "model=flow model=hifigan model=llm"),
        ("train trainer.acc", "trainer.accumulate="),
        ("export format=", "format=jit format=official format=onnx format=pt2"),
    ],
)
def test_tab_completion_offers_options_and_keys(typed, offered, tmp_path):
    line = f"cosyexp-{typed}"
    env = {**environment(), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    said = subprocess.run(
        [script(typed.split()[0]), "-sc", "query=bash"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == offered.split()
