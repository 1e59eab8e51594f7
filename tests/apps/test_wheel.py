"""The wheel: what is in it, and that its apps run where nothing of the repository is."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cosyexp.cli.hydra_app import CONFIG_DIR
from tests.support import ROOT, checkpoints, environment, train_words

PACKAGES = ("cosyexp", "hydra_plugins")


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and the dependencies of the environment of the tests.

    python: its interpreter. site: its site-packages. wheel: the file that was installed.
    """

    python: Path
    site: Path
    wheel: Path

    def run(self, *words: str, cwd: Path) -> str:
        """Runs a command of the environment and returns what it prints."""
        env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
        result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    checked(*pip, "wheel", "--no-deps", *isolation, "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("cosyexp-*.whl")
    venv.create(folder / "venv", with_pip=False, system_site_packages=False)
    python = folder / "venv/bin/python"
    checked(*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    # a path in a .pth file comes after the folder of the file, and its own .pth files, such as
    # that of an editable install, are not read
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return Installed(python, site, wheel)


def checked(*words: str) -> None:
    result = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def files_of(folder: Path, pattern: str) -> set[str]:
    """The files of the repository below a folder, by their path in the wheel."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_code_configs_license_and_notice(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    configs = {
        f"cosyexp/conf/{path.relative_to(CONFIG_DIR).as_posix()}"
        for path in CONFIG_DIR.rglob("*.yaml")
    }
    tokens = files_of(ROOT / "cosyexp/data/special_tokens", "*.txt")
    code = {file for package in PACKAGES for file in files_of(ROOT / package, "*.py")}
    assert configs and tokens and {"hydra_plugins/cosyexp/search_path.py"} <= code
    (about,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    metadata = {name for name in files if name.startswith(f"{about}/")}
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in metadata}
    texts = {*files_of(ROOT / "cosyexp", "*.html"), *files_of(ROOT / "cosyexp", "*.md")}
    assert files - metadata == {*configs, *tokens, *texts, *code}  # no tests, benchmarks, docs


def test_the_apps_compose_from_any_folder(installed, tmp_path):
    where = "import cosyexp.cli.hydra_app as app; print(app.__file__, app.CONFIG_DIR)"
    module, folder = installed.run(str(installed.python), "-c", where, cwd=tmp_path).split()
    assert module == f"{installed.site}/cosyexp/cli/hydra_app.py"
    assert folder == f"{installed.site}/cosyexp/conf"
    shown = {}
    for app in ("train", "export"):
        words = [str(installed.python), "-m", f"cosyexp.{app}", "--cfg", "job"]
        shown[app] = yaml.safe_load(installed.run(*words, cwd=tmp_path))
    assert shown["train"]["network"]["_target_"].endswith(".TransformerLM")
    assert shown["train"]["trainer"]["steps"] == 800
    assert shown["export"]["format"]["_target_"] == "cosyexp.exporting.onnx.Onnx"
    assert list(tmp_path.iterdir()) == []


def test_the_plugins_of_the_wheel_are_found(installed, tmp_path):
    """The export app finds conf/hydra/ by the search-path plugin alone."""
    script = str(installed.python.with_name("cosyexp-export"))
    words = ["hydra/sweeper=optuna", "--cfg", "hydra", "--package", "hydra.sweeper"]
    sweeper = yaml.safe_load(installed.run(script, *words, cwd=tmp_path))
    assert sweeper["_target_"] == "hydra_plugins.cosyexp.sweepers.OptunaSweeper"


def test_a_training_and_an_average_run(installed, data, tmp_path):
    words = train_words("llm", data, "trainer.steps=1", "run_dir=run")
    train = str(installed.python.with_name("cosyexp-train"))
    assert "done at step 1" in installed.run(train, *words, cwd=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step_00000000", "step_00000001"]
    average = [str(installed.python), "-m", "cosyexp.average", "run_dir=run", "num=1"]
    assert "run/averages/best1" in installed.run(*average, cwd=tmp_path)
