"""Help, the composed config, tab completion: Hydra's flags, and none of them needs torch."""

import shlex
import subprocess
import sys
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
    "compare": ["run_dir=a,b,c", "metric=", "metric_mode=min|max", "out="],
    "evaluate": [
        "llm=",
        "flow=",
        "hifigan=",
        "valid=",
        "limit=",
        "judge=",
        "exports=",
        "official=",
        "metric_mode=min|max",
        "out=",
    ],
    "average": ["run_dir=", "select=best|last", "num=", "metric=", "method=", "output="],
    "export": [
        "format=onnx|jit|pt2",
        "format=hf",
        "run_dir=",
        "weights=",
        "precision=",
        "components=",
        "out=",
        "official=",
        "metric_mode=min|max",
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
        "score=none|edit|wer",
        "weights=",
        "limit=",
        "seed=",
    ],
    "push": ["run_dir=", "repo=", "format=", "private=", "endpoint=", "HF_TOKEN"],
    "pull": ["repo=", "out=", "revision=", "endpoint=", "trusted_exports=true"],
}
# what --help of the train app says of Hydra's flags
HYDRA_FLAGS = ["-m  ", "--cfg job", "--info defaults-tree", "--hydra-help", "hydra/launcher="]
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


def without_torch(app: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs an app, whose last line on stderr then is whether torch was imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(app=app), *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("app", APPS)
def test_help_names_the_keys_and_gives_examples(app, tmp_path):
    output = command(app, "--help", cwd=tmp_path).stdout
    assert [word for word in APPS[app] if word not in output] == []
    examples = [line for line in output.splitlines() if line.startswith("  python -m cosyexp.")]
    assert len(examples) == 3
    assert all(line.startswith(f"  python -m cosyexp.{app}") for line in examples)
    assert max(map(len, output.splitlines())) <= 140
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("app", APPS)
def test_help_needs_no_torch(app, tmp_path):
    shown = [without_torch(app, flag, cwd=tmp_path) for flag in ("--help", "-h")]
    for result in shown:
        assert (result.returncode, result.stderr) == (0, "False\n")
    assert shown[0].stdout == shown[1].stdout


def test_help_names_the_flags_of_hydra(tmp_path):
    output = command("train", "--help", cwd=tmp_path).stdout
    assert [flag for flag in HYDRA_FLAGS if flag not in output] == []


@pytest.mark.parametrize("app", APPS)
def test_examples_of_the_help_compose(app, tmp_path):
    """Every override of an example is one that the app has."""
    output = command(app, "--help", cwd=tmp_path).stdout
    for line in output.splitlines():
        if not line.startswith(f"  python -m cosyexp.{app}"):
            continue
        words = [word.replace("=...", "=x") for word in shlex.split(line)[3:] if word != "..."]
        single = [word.split(",")[0] for word in words if word != "-m"]
        result = without_torch(app, *single, "--cfg", "job", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "False\n"), (line, result.stderr)


@pytest.mark.parametrize("app", APPS)
def test_the_composed_config_is_shown_without_torch(app, tmp_path):
    result = without_torch(app, "--cfg", "job", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "False\n")
    assert isinstance(yaml.safe_load(result.stdout), dict)
    assert list(tmp_path.iterdir()) == []


FLAGS = {
    "--hydra-help": ["--multirun", "--config-dir", "--cfg", "--info", "--resolve"],
    "--version": ["Hydra 1."],
    "--cfg job --package trainer": ["# @package trainer", "valid_every: 50"],
    "--cfg job --resolve": ["run_dir: runs/demo/llm\n", "warmup: 100"],
    "--cfg hydra": ["cosyexp.cli.sweep.SweepCallback", "output_subdir: null"],
    "--info defaults-tree": ["llm_demo", "tokenizer@family.tokenizer"],
    "--info defaults": ["hydra/default", "mode/sft"],
    "--info searchpath": ["cosyexp", "structured://"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_hydra_s_own_flags_work_without_torch(flags, tmp_path):
    result = without_torch("train", *flags.split(), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "False\n")
    assert [part for part in FLAGS[flags] if part not in result.stdout] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["trainer.stepz=1"], ["data=parquet"]])
def test_a_wrong_word_is_refused_without_torch(words, tmp_path):
    result = without_torch("train", *words, cwd=tmp_path)
    first, second = result.stderr.splitlines()
    assert result.returncode == 1 and first == "False" and second.startswith("cosyexp: ")


def test_every_app_has_a_console_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    apps = {
        path.stem for path in (ROOT / "cosyexp").glob("*.py") if "@hydra_app(" in path.read_text()
    }
    assert apps == set(APPS)
    assert scripts == {f"cosyexp-{app}": f"cosyexp.{app}:main" for app in apps}


def test_a_console_script_installs_tab_completion(tmp_path):
    result = subprocess.run(
        [script("train"), "-sc", "install=bash"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "complete " in result.stdout
    assert result.stdout.rstrip().endswith("cosyexp-train")
    checked = subprocess.run(["bash", "-n"], input=result.stdout, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train model=", "model=flow model=hifigan model=llm"),
        ("train debug=", "debug=fast_dev_run debug=overfit debug=profiler"),
        ("train trainer.acc", "trainer.accumulate="),
        (
            "export format=",
            "format=hf format=jit format=official format=onnx format=peft format=pt2",
        ),
    ],
)
def test_tab_completion_offers_options_and_keys(typed, offered, tmp_path):
    line = f"cosyexp-{typed}"
    env = {**environment(), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    result = subprocess.run(
        [script(typed.split()[0]), "-sc", "query=bash"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == offered.split()
