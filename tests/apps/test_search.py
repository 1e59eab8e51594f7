"""hydra/sweeper=optuna: the search space, trials that fail or are not finite, and the command."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from cosyexp.errors import UserError
from hydra_plugins.cosyexp.sweepers import OptunaSweeper
from tests.apps.test_sweeps import table
from tests.support import sentence, train_words

Task = Callable[[dict[str, str]], Any]
OPTIONS: dict[str, Any] = {
    "params": None,
    "direction": "minimize",
    "n_trials": 8,
    "n_jobs": 1,
    "sampler": "TPESampler",
    "seed": 0,
    "storage": None,
    "study_name": None,
}


class Launcher:
    """Stands in for Hydra's: calls a task with each job's overrides, whose exceptions fail it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batches: list[list[dict[str, str]]] = []
        self.first: list[int] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        batch = [dict(word.split("=", 1) for word in words) for words in jobs]
        self.batches.append(batch)
        self.first.append(initial_job_idx)
        return [self.job(overrides) for overrides in batch]

    def job(self, overrides: dict[str, str]) -> JobReturn:
        try:
            return JobReturn(status=JobStatus.COMPLETED, _return_value=self.task(overrides))
        except ValueError as error:
            return JobReturn(status=JobStatus.FAILED, _return_value=error)

    @property
    def jobs(self) -> list[dict[str, str]]:
        return [overrides for batch in self.batches for overrides in batch]


def search(folder: Path, task: Task, *words: str, **options: Any) -> tuple[Launcher, Any]:
    """Runs a search; returns its launcher and the content of optimization_results.yaml."""
    sweeper = OptunaSweeper(**{**OPTIONS, **options})
    launcher = Launcher(task)
    sweeper.launcher = launcher  # type: ignore[assignment]
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    sweeper.sweep(list(words))
    return launcher, yaml.safe_load((folder / "optimization_results.yaml").read_text())


def test_a_search_finds_the_lowest_value(tmp_path, capsys):
    def parabola(overrides: dict[str, str]) -> float:
        return (float(overrides["x"]) - 2) ** 2

    launcher, best = search(tmp_path, parabola, "x=interval(0.0,5.0)", "y=1", n_trials=30)
    assert len(launcher.jobs) == 30 and {job["y"] for job in launcher.jobs} == {"1"}
    values = [parabola(job) for job in launcher.jobs]
    assert best["best_value"] == min(values) < 0.05
    assert (best["best_params"]["x"] - 2) ** 2 == best["best_value"]
    assert re.fullmatch(r"best of 30 trials: \S+ with x=\S+\n", capsys.readouterr().out)


def test_a_search_finds_the_highest_value(tmp_path):
    launcher, best = search(
        tmp_path, lambda overrides: float(overrides["x"]), "x=1,5,3", direction="maximize"
    )
    assert best["best_value"] == max(float(job["x"]) for job in launcher.jobs)


SPACES: dict[str, Callable[[str], bool]] = {
    "interval(0.5,1.5)": lambda x: 0.5 <= float(x) <= 1.5,
    "int(interval(2,6))": lambda x: x in "23456",
    "tag(log,interval(1e-5,1e-1))": lambda x: 1e-5 <= float(x) <= 1e-1,
    "range(0,10,step=5)": lambda x: x in ("0", "5", "10"),
    "range(0.0,1.0,step=0.25)": lambda x: float(x) % 0.25 == 0,
    "choice(adam,adamw)": lambda x: x in ("adam", "adamw"),
    "a,b": lambda x: x in "ab",
    "[1,2],[3]": lambda x: x in ("[1,2]", "[3]"),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("where", ["command", "config"])
def test_a_search_space_in_the_syntax_of_hydra_s_sweeps(space, where, tmp_path):
    """On the command line, or as hydra.sweeper.params."""
    words = [f"x={space}"] if where == "command" else []
    params = {"x": space} if where == "config" else None
    launcher, _ = search(tmp_path, lambda overrides: 1.0, *words, params=params, n_trials=12)
    values = [job["x"] for job in launcher.jobs]
    assert len(set(values)) > 1 and [x for x in values if not SPACES[space](x)] == []


def test_a_logarithmic_space_is_drawn_from_all_its_decades(tmp_path):
    words, options = ["x=tag(log,interval(1e-6,1.0))"], {"sampler": "RandomSampler"}
    launcher, _ = search(tmp_path, lambda overrides: 1.0, *words, n_trials=40, **options)
    decades = {math.floor(math.log10(float(job["x"]))) for job in launcher.jobs}
    assert decades >= {-6, -5, -4, -3, -2, -1}


def test_the_command_line_replaces_the_configured_space(tmp_path):
    params = {"x": "interval(0.0,1.0)", "y": "interval(0.0,1.0)"}
    launcher, _ = search(tmp_path, lambda overrides: 1.0, "x=7", params=params)
    assert {job["x"] for job in launcher.jobs} == {"7"}
    assert len({job["y"] for job in launcher.jobs}) == 8


def test_a_group_in_two_packages_is_two_overrides(tmp_path):
    words = ["optimizer=sgd", "optimizer@model.discriminator.optimizer=adam", "x=choice(1,2)"]
    launcher, _ = search(tmp_path, lambda overrides: 1.0, *words)
    kinds = {(job["optimizer"], job[words[1].split("=")[0]]) for job in launcher.jobs}
    assert kinds == {("sgd", "adam")}


def test_trials_side_by_side(tmp_path):
    launcher, _ = search(tmp_path, lambda overrides: 1.0, "x=interval(0.0,1.0)", n_jobs=3)
    assert [len(batch) for batch in launcher.batches] == [3, 3, 2]
    assert launcher.first == [0, 3, 6]


def test_the_same_seed_draws_the_same_trials(tmp_path):
    def drawn(seed: int) -> list[str]:
        launcher, _ = search(tmp_path, lambda o: float(o["x"]), "x=interval(0.0,1.0)", seed=seed)
        return [job["x"] for job in launcher.jobs]

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "text", "fails"])
def test_a_trial_without_a_finite_value_does_not_end_the_search(bad, tmp_path, capsys):
    def task(overrides: dict[str, str]) -> Any:
        if overrides["x"] == "bad" and bad == "fails":
            raise ValueError("this trial fails")
        return bad if overrides["x"] == "bad" else float(overrides["x"])

    launcher, best = search(tmp_path, task, "x=2,bad,1", n_trials=12)
    values = [job["x"] for job in launcher.jobs]
    assert len(values) == 12 and set(values) == {"1", "2", "bad"}
    assert (best["best_params"], best["best_value"]) == ({"x": 1}, 1.0)
    assert f"best of {12 - values.count('bad')} trials: 1 with x=1" in capsys.readouterr().out


def test_a_search_whose_trials_all_fail_says_so(tmp_path):
    with pytest.raises(UserError, match="every trial of the search failed"):
        search(tmp_path, lambda overrides: math.nan, "x=1,2", n_trials=3)
    assert not (tmp_path / "optimization_results.yaml").exists()


def test_a_search_is_continued_from_its_storage(tmp_path):
    options = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "mine", "n_trials": 3}
    for seed in (0, 1):
        search(tmp_path, lambda o: float(o["x"]), "x=interval(0.0,1.0)", seed=seed, **options)
    study = optuna.load_study(study_name="mine", storage=options["storage"])  # type: ignore[arg-type]
    assert len(study.trials) == 6
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(trial.value for trial in study.trials)  # type: ignore[type-var]


# the command -------------------------------------------------------------------------------------


def results(folder: Path) -> Any:
    (path,) = folder.glob("multirun/train/*/optimization_results.yaml")
    return yaml.safe_load(path.read_text())


def test_a_search_of_the_overlay_finds_settings_by_the_validation_loss(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=2", "hparams_search=lr")
    output = warm("train", "-m", *words, "hydra.sweeper.n_trials=3", cwd=tmp_path).stdout
    rows, found = table(output), results(tmp_path)
    assert len({row["run_dir"] for row in rows}) == 3
    best = min(rows, key=lambda row: float(row["valid_loss"]))
    params = dict(word.split("=") for word in best["overrides"].split())
    assert {key: str(value) for key, value in found["best_params"].items()} == params
    assert set(params) == {"optimizer.lr", "model.warmup"}
    assert f"{found['best_value']:.6g}" == best["valid_loss"]
    assert f"best of 3 trials: {best['valid_loss']} with " in output


def test_failing_and_nan_trials_do_not_end_the_search(data, warm, tmp_path):
    """Three heads do not divide the width; a rate of 1e38 leaves no finite validation loss."""
    space = ["network.llm.heads=2,3", "optimizer.lr=1e-3,1e38", "model.warmup=0"]
    options = ["hydra/sweeper=optuna", "hydra.sweeper.sampler=RandomSampler"]
    once = ["trainer.steps=1", "trainer.valid_every=0", "trainer.previews=0"]
    trials = ["hydra.sweeper.n_trials=6", "hydra.sweeper.seed=0"]
    words = train_words("llm", data, *once, *space, *options, *trials)
    result = warm("train", "-m", *words, cwd=tmp_path)
    rows = table(result.stdout)
    assert len(rows) == 6
    kinds = set()
    for row in rows:
        failed, wild = "heads=3" in row["overrides"], "lr=1e+38" in row["overrides"]
        assert row["status"] == ("failed" if failed else "completed")
        assert ("width=16 must be a multiple of heads=3" in row["error"]) == failed
        assert (row["valid_loss"] == "") == (failed or wild)
        kinds.add((failed, wild))
    assert {(True, False), (False, True), (False, False)} <= kinds
    found = results(tmp_path)
    assert found["best_params"] == {"network.llm.heads": 2, "optimizer.lr": 0.001}
    assert math.isfinite(found["best_value"])


def test_a_search_that_finds_nothing_is_one_sentence(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=1", "network.llm.heads=3,5")
    options = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"]
    result = warm("train", "-m", *words, *options, cwd=tmp_path, check=False)
    sentence(result, "every trial of the search failed")
    assert [row["status"] for row in table(result.stdout)] == ["failed", "failed"]
