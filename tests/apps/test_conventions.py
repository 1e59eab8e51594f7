"""Hydra's conventions: config dirs, overlays, lists of options, and aliases of keys."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosyexp.cli.hydra_app import CONFIG_DIR
from tests.apps.test_sweeps import table
from tests.apps.warm import Warm
from tests.support import ROOT, TINY, checkpoints, metrics, sentence, train_words


def shown(warm: Warm, app: str, *words: str, cwd: Path) -> dict[str, Any]:
    """The config that an app composes."""
    output = warm(app, *words, "--cfg", "job", cwd=cwd).stdout
    config = yaml.safe_load(output)
    assert isinstance(config, dict)
    return config


def plain_words(model: str, data: Path, *words: str) -> list[str]:
    """Words that set nothing which a debug overlay sets."""
    return [
        f"model={model}",
        "data=prepared",
        f"data.dir={data}",
        "data.processes=1",
        *TINY[model],
        *words,
    ]


# config dirs and experiments ---------------------------------------------------------------------

MINE = {
    "experiment/mine.yaml": """
        # @package _global_
        defaults:
          - override /model: flow
          - override /optimizer: sgd
          - override /callbacks: [throughput, early_stopping]
        trainer: {steps: 7}
        seed: 3
    """,
    "optimizer/sgd.yaml": """
        _target_: torch.optim.SGD
        _partial_: true
        lr: 0.5
    """,
    "debug/mine.yaml": """
        # @package _global_
        trainer: {steps: 1}
    """,
    "export/format/mine.yaml": """
        _target_: cosyexp.exporting.onnx.Onnx
        opset: 20
    """,
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A config folder of a user."""
    for name, text in MINE.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line[8:] for line in text.strip("\n").splitlines()) + "\n")
    return tmp_path / "mine"


@pytest.mark.parametrize("flag", [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]])
def test_a_group_of_one_s_own_config_dir(flag, mine, warm, tmp_path):
    config = shown(warm, "train", *flag, "optimizer=sgd", "optimizer.lr=0.25", cwd=tmp_path)
    assert config["optimizer"] == {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.25}


def test_flags_may_stand_between_overrides(mine, warm, tmp_path):
    words = ["seed=4", "--config-dir", "mine", "optimizer=sgd", "-c", "job", "trainer.steps=5"]
    config = yaml.safe_load(warm("train", *words, cwd=tmp_path).stdout)
    assert (config["seed"], config["trainer"]["steps"]) == (4, 5)
    assert config["optimizer"]["_target_"] == "torch.optim.SGD"


def test_an_experiment_of_one_s_own_picks_groups_and_sets_keys(mine, warm, tmp_path):
    config = shown(warm, "train", "--config-dir", "mine", "experiment=mine", cwd=tmp_path)
    assert config["model"]["name"] == "flow"
    assert config["network"]["_target_"].endswith(".MaskedDiffWithXvec")
    assert config["objective"]["_target_"].endswith(".FlowMatchingLoss")
    # demo's network sets a learning rate of its own, after the optimizer
    assert config["optimizer"]["_target_"] == "torch.optim.SGD"
    assert list(config["callbacks"]) == ["throughput", "early_stopping"]
    assert (config["trainer"]["steps"], config["seed"]) == (7, 3)
    # the command line has the last word
    words = ["--config-dir", "mine", "experiment=mine", "model=llm", "trainer.steps=8"]
    config = shown(warm, "train", *words, cwd=tmp_path)
    assert (config["model"]["name"], config["trainer"]["steps"]) == ("llm", 8)


@pytest.mark.parametrize("overlay", ["experiment=mine", "debug=mine", "hparams_search=lr"])
def test_a_plus_before_an_overlay_changes_nothing(overlay, mine, warm, tmp_path):
    flag = ["--config-dir", "mine"]
    config = shown(warm, "train", *flag, overlay, cwd=tmp_path)
    assert shown(warm, "train", *flag, f"+{overlay}", cwd=tmp_path) == config


def test_a_debug_overlay_comes_after_an_experiment(mine, warm, tmp_path):
    words = ["--config-dir", "mine", "debug=mine", "experiment=mine"]
    config = shown(warm, "train", *words, cwd=tmp_path)
    assert (config["trainer"]["steps"], config["seed"]) == (1, 3)


def test_null_overlays_are_the_default(warm, tmp_path):
    nothing = ["experiment=null", "+debug=null", "hparams_search=null"]
    config = shown(warm, "train", *nothing, cwd=tmp_path)
    assert config == shown(warm, "train", cwd=tmp_path)


def test_no_config_of_ours_sets_the_mode_of_hydra():
    # cli/mode.py relies on it
    for path in CONFIG_DIR.rglob("*.yaml"):
        assert "mode" not in ((yaml.safe_load(path.read_text()) or {}).get("hydra") or {}), path


def test_an_experiment_of_one_s_own_sweeps_without_a_flag(mine, warm, tmp_path):
    sweep = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"seed": "1,2"}}}}
    text = "# @package _global_\n" + yaml.safe_dump(sweep)
    (mine / "experiment/sweep.yaml").write_text(text)
    words = ["--config-dir", "mine", "experiment=sweep", "data=prepared", "data.dir=nowhere"]
    result = warm("train", *words, cwd=tmp_path, check=False)
    assert [row["overrides"] for row in table(result.stdout)] == ["seed=1", "seed=2"]


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "mine", "format=mine"],
        ["format=mine", "--config-dir=mine"],
        ["latency=false", "format=mine", "-cd", "mine"],
    ],
)
def test_a_format_of_one_s_own_config_dir(words, mine, warm, tmp_path):
    config = shown(warm, "export", *words, cwd=tmp_path)
    assert config["format"]["opset"] == 20


def test_a_config_dir_that_is_missing(refused):
    refused("train", ["--config-dir", "nowhere", "trainer.steps=1"], "nowhere")


def test_an_experiment_that_is_missing_is_answered_with_those_there_are(mine, refused):
    words = ["--config-dir", "mine", "experiment=yours"]
    found = " ".join(sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")))
    refused("train", words, "experiment/yours", f"Available options: {found} mine")


# flags that exclude each other -------------------------------------------------------------------


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["-c", "job"], ["--cfg=job"], ["--info"]])
def test_a_sweep_shows_no_config(flag, refused):
    refused("train", ["-m", "seed=1,2", *flag], f"-m and {flag[0][:5].split('=')[0]}", "leave out")


# lists of options ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_with_lists(data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two callbacks and two loggers, which are not the default."""
    folder = tmp_path_factory.mktemp("lists")
    lists = ["callbacks=[throughput,best_checkpoint]", "logger=[jsonl,csv]"]
    best = ["callbacks.best_checkpoint.monitor=loss", "callbacks.best_checkpoint.mode=min"]
    words = train_words("llm", data, "trainer.steps=2", *lists, *best, "run_dir=run")
    warm("train", *words, cwd=folder)
    return folder / "run"


def test_several_callbacks(run_with_lists):
    config = yaml.safe_load((run_with_lists / "config.yaml").read_text())
    assert list(config["callbacks"]) == ["throughput", "best_checkpoint"]
    lines = [json.loads(line) for line in (run_with_lists / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "time/tokens_per_second" in line] == [1, 2]


def test_several_loggers_replace_the_default_ones(run_with_lists):
    names = {path.name for path in run_with_lists.iterdir()}
    assert {"metrics.jsonl", "metrics.csv"} <= names and "tensorboard" not in names
    rows = list(csv.DictReader((run_with_lists / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    losses = {
        line["step"]: line["train/loss"] for line in metrics(run_with_lists) if "train/loss" in line
    }
    assert {int(row["step"]): float(row["train/loss"]) for row in rows[1:]} == losses


# debug --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TINY)
def test_a_fast_dev_run_trains_validates_saves_and_shows(model, data, warm, tmp_path):
    words = plain_words(model, data, "debug=fast_dev_run")
    output = warm("train", *words, cwd=tmp_path).stdout
    run = tmp_path / "runs/debug/demo" / model
    assert "done at step 2" in output and "16 training utterances" in output
    assert checkpoints(run) == ["step_00000000", "step_00000001", "step_00000002"]
    lines = metrics(run)
    assert [line["step"] for line in lines if "valid/loss" in line] == [0, 1, 2]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert list((run / "tensorboard").iterdir())


def test_overfit_learns_four_utterances_by_heart(data, warm, tmp_path):
    parts = ("text_encoder", "llm")
    wider = [f"network.{part}.{size}" for part in parts for size in ("width=64", "hidden=128")]
    words = plain_words("llm", data, *wider, "model.warmup=0", "optimizer.lr=1e-2")
    output = warm("train", *words, "debug=overfit", cwd=tmp_path).stdout
    run = tmp_path / "runs/debug/overfit/demo/llm"
    assert "4 training utterances" in output and "done at step 300" in output
    lines = metrics(run)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 30 and losses[-1] < 0.2 * losses[0]
    # the validation at the end shows that nothing else was learned
    (validation,) = (line for line in lines if "valid/loss" in line)
    assert validation["step"] == 300 and validation["valid/loss"] > losses[0]
    assert checkpoints(run) == ["step_00000300"]


def test_the_debug_profiler_writes_a_trace(data, warm, tmp_path):
    warm("train", *plain_words("flow", data, "debug=profiler"), cwd=tmp_path)
    run = tmp_path / "runs/debug/profile/demo/flow"
    trace = json.loads((run / "profile/step_10.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert checkpoints(run) == ["step_00000020"]


# aliases ------------------------------------------------------------------------------------------


def test_the_alias_of_the_gradient_norm(data, warm, tmp_path):
    warm(
        "train",
        *train_words("llm", data, "trainer.steps=0", "trainer.clip=0.5", "run_dir=run"),
        cwd=tmp_path,
    )
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["trainer"]["max_grad_norm"] == 0.5 and "clip" not in config["trainer"]
    words = yaml.safe_load((tmp_path / "run/overrides.yaml").read_text())
    assert "trainer.max_grad_norm=0.5" in words and "trainer.clip=0.5" not in words


def test_the_alias_in_a_sweep_names_folders_by_the_key(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=0", "trainer.clip=1,5")
    warm("train", "-m", *words, cwd=tmp_path)
    names = {path.name for path in (tmp_path / "runs/demo").iterdir()}
    assert names == {f"llm+trainer.max_grad_norm-{value}" for value in (1, 5)}


def test_the_alias_has_the_range_of_its_key(data, refused):
    words = train_words("llm", data, "trainer.steps=1", "trainer.clip=0")
    refused("train", words, "trainer.max_grad_norm=0.0 must be > 0", "null for no clipping")


# without validation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unvalidated(data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has no validation data, resumed once."""
    folder = tmp_path_factory.mktemp("unvalidated")
    words = train_words("llm", data, "data.valid=null", "checkpoint.every=1", "run_dir=run")
    for steps in (1, 3):
        output = warm("train", *words, f"trainer.steps={steps}", cwd=folder).stdout
        assert f"done at step {steps}" in output and "validation" not in output
    return folder


def test_a_training_without_validation(unvalidated):
    lines = metrics(unvalidated / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert not [key for line in lines for key in line if key.startswith("valid/")]
    assert checkpoints(unvalidated / "run")[-1] == "step_00000003"
    for path in (unvalidated / "run/checkpoints").glob("*/meta.yaml"):
        assert yaml.safe_load(path.read_text())["loss_dict"] == {}


def test_what_needs_a_validation_says_so(unvalidated, warm):
    average = warm("average", "run_dir=run", "num=1", cwd=unvalidated, check=False)
    sentence(average, "no checkpoint with a validation loss", "select=last")
    export = warm("export", "run_dir=run", "format=jit", cwd=unvalidated, check=False)
    sentence(export, "no checkpoint for weights=best", "choose other weights")


def test_the_last_checkpoints_are_averaged_and_exported(unvalidated, warm):
    warm("average", "run_dir=run", "select=last", "num=2", cwd=unvalidated)
    words = ["run_dir=run", "format=official", "weights=average"]
    warm("export", *words, cwd=unvalidated)
    assert (unvalidated / "run/exports/official/llm.pt").exists()
