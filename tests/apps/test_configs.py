"""conf/: every file composes and builds, every key is read by somebody, and the wheel brings it along."""

import ast
import importlib.util
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cosyexp.registry import build
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from hydra.utils import get_object
from omegaconf import OmegaConf

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from tests.support import MODELS, ROOT, config, environment

NOT_THE_ENGINES = {
    "nproc_per_node",
    "threads",
}  # they stand in its node, and are read by the launcher and the session
ALL = sorted(
    path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.yaml")
)
FILES = [file for file in ALL if not file.startswith("door/")]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


@cache
def composed(app: str, *words: str) -> dict[str, Any]:
    register()
    folder, _, name = app.rpartition("/")
    with initialize_config_dir(version_base="1.3", config_dir=str((CONFIG_DIR / folder).resolve())):
        container = OmegaConf.to_container(compose(name, overrides=list(words)), enum_to_str=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def train_of(file: str) -> list[str]:
    """The words of `cosyexp.train` that choose a file: conf/network/flow_demo.yaml by model=flow family=demo."""
    group, name = file.split("/")
    if group in ("network", "recipe"):
        model, family = name.split("_")
        return [f"model={model}", f"family={family}"]
    if group == "objective":
        mode, model = name.split("_")
        return [f"mode={mode}", f"model={model}"]
    if group == "tokenizer":
        return [f"tokenizer@family.tokenizer={name}"]
    return [f"{group}={name}"]


def choice(file: str) -> tuple[str, list[str]]:
    """The app and the words that compose a file of conf/."""
    if "/" not in file:
        return ("train" if file == "door" else file), []
    if file.startswith("export/"):
        return "export/config", [f"format={file.split('/')[-1]}"] if "format" in file else []
    group, option = file.split("/")
    prepares = group in ("corpus", "speech_tokenizer", "speaker_encoder")
    return ("prepare", [f"{group}={option}"]) if prepares else ("train", train_of(file))


def leaves(node: Any) -> Iterator[str]:
    """All keys below a node, with those of the nodes themselves."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield key
            yield from leaves(value)


def own_keys(file: str) -> set[str]:
    own = yaml.safe_load((CONFIG_DIR / f"{file}.yaml").read_text()) or {}
    return set(
        leaves({key: value for key, value in own.items() if key not in ("defaults", "hydra")})
    )


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_its_keys_arrive(file):
    app, words = choice(file)
    assert own_keys(file) <= set(leaves(composed(app, *words)))


@pytest.mark.parametrize("file", [file for file in ALL if file.startswith("door/")])
@pytest.mark.parametrize("app", ["train", "average", "export/config"])
def test_launchers_and_sweepers_compose_with_every_app(file, app):
    """Hydra knows their keys itself."""
    register()
    folder, _, name = app.rpartition("/")
    _, group, option = file.split("/")
    with initialize_config_dir(version_base="1.3", config_dir=str((CONFIG_DIR / folder).resolve())):
        cfg = compose(name, overrides=[f"hydra/{group}={option}"], return_hydra_config=True)
    own = yaml.safe_load((CONFIG_DIR / f"{file}.yaml").read_text())
    assert set(own) - {"defaults"} <= set(cfg.hydra[group])


@pytest.mark.parametrize(
    ("family", "mode", "model"), product(options("family"), options("mode"), MODELS)
)
def test_axes_compose_or_hydra_names_the_options(family, mode, model):
    words = [f"family={family}", f"mode={mode}", f"model={model}"]
    if f"{model}_{family}" in options("network") and f"{mode}_{model}" in options("objective"):
        assert composed("train", *words)["model"]["name"] == model
    else:
        with pytest.raises(MissingConfigException, match="Available options"):
            composed("train", *words)


@pytest.mark.parametrize(
    "group", ["family", "model", "mode", "engine", "data", "optimizer", "scheduler", "experiment"]
)
def test_a_misspelled_option_is_answered_with_the_available_ones(group):
    with pytest.raises(MissingConfigException) as told:
        composed("train", f"{group}=nothing")
    assert f"'{group}/nothing'" in str(told.value) and "Available options" in str(told.value)
    assert all(option in str(told.value) for option in options(group))


@pytest.mark.parametrize("model", MODELS)
def test_every_optimizer_and_scheduler_builds_and_moves_the_network(model, tmp_path):
    for optimizer, scheduler in product(options("optimizer"), options("scheduler")):
        cfg = config(model, tmp_path, f"optimizer={optimizer}", f"scheduler={scheduler}")
        objective = build(cfg.objective, "objective")(build(cfg.network, "network"))
        trainable = objective.trainables[model]
        rates = [trainable.scheduler(update, 1.0) for update in range(300)]
        assert max(rates) > 0 and all(0 <= rate <= 1 for rate in rates)
        weight = next(
            parameter for parameter in trainable.module.parameters() if parameter.requires_grad
        )
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        trainable.optimizer(trainable.module.parameters()).step()
        assert not torch.equal(before, weight)


@pytest.mark.parametrize("model", MODELS)
def test_views_components_and_engines_build(model, tmp_path):
    cfg = config(model, tmp_path)
    assert build(cfg.model.collator, "collator").fields
    network = build(cfg.network, "network")
    assert all(build(node, network).inputs for node in cfg["components"].values())
    for engine in options("engine"):
        node = {
            k: v
            for k, v in config(model, tmp_path, f"engine={engine}")["engine"].items()
            if k not in ("nproc_per_node", "threads")
        }
        assert callable(build(node))


def test_the_text_vocabulary_of_the_demo_is_the_tokenizer_s():
    """Those of the others: tests/parity/test_tokenizers.py."""
    cfg = composed("train", "family=demo")["family"]
    assert (
        max(build(cfg["tokenizer"]).encode(cfg["tokenizer"]["alphabet"])) + 1
        == cfg["text_vocabulary"]
    )


# every key is read --------------------------------------------------------------------------------------------------


@cache
def names_in_the_code() -> frozenset[str]:
    """Attributes, keywords, parameters, fields and strings of cosyexp/, but for the schema, which only declares."""
    names: set[str] = set()
    for path in (ROOT / "cosyexp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "config.py" else ():
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.arg | ast.keyword):
                names.add(node.arg or "")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return frozenset(names)


@cache
def interpolations() -> str:
    return "\n".join(path.read_text() for path in CONFIG_DIR.rglob("*.yaml"))


def is_read(key: str, path: str) -> bool:
    return key in names_in_the_code() or f"${{{path}}}" in interpolations()


def parameters(target: Any) -> set[str]:
    """What a function or class takes; one that hands **options on to its base takes what that takes."""
    found = inspect.signature(target).parameters.values()
    names = {parameter.name for parameter in found}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
        assert target.__bases__ != (object,), target
        names |= parameters(target.__base__)
    return names


def unread(node: Any, path: str = "") -> Iterator[str]:
    """The keys below a composed node that its constructor does not take, or, without one, that no code names."""
    if isinstance(node, list):
        for item in node:
            yield from unread(item, path)
    if not isinstance(node, Mapping):
        return
    taken: set[str] = set()
    if "_target_" in node:
        taken = (
            parameters(get_object(node["_target_"])) | {"_target_", "_partial_"} | NOT_THE_ENGINES
        )
    for key, value in node.items():
        here = f"{path}.{key}" if path else key
        if path != "components" and not (key in taken if taken else is_read(key, here)):
            yield here
        yield from unread(value, here)


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_read(file):
    app, words = choice(file)
    assert [
        path for path in unread(composed(app, *words)) if path.split(".")[-1] in own_keys(file)
    ] == []


# the wheel ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, in a folder."""
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", out, ROOT],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    with zipfile.ZipFile(next(out.glob("cosyexp-*.whl"))) as archive:
        archive.extractall(out / "content")
    return out / "content"


def test_the_wheel_holds_code_configs_license_and_notice(wheel):
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert {f"cosyexp/conf/{file}.yaml" for file in ALL} == {
        file for file in files if file.startswith("cosyexp/conf/")
    }
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cosyexp").rglob("*.py")}
    assert code == {file for file in files if file.endswith(".py")}
    marks = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cosyexp/data/special_tokens").iterdir()
    }
    assert marks and marks <= files
    assert {"LICENSE", "NOTICE"} <= {Path(file).name for file in files}


def test_apps_of_the_wheel_run_from_any_folder(wheel, tmp_path):
    env = {**environment(), "PYTHONPATH": str(wheel)}

    def said(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert (
        said("-c", "from cosyexp.cli.hydra_app import CONFIG_DIR; print(CONFIG_DIR)")
        == f"{wheel}/cosyexp/conf\n"
    )
    assert yaml.safe_load(said("-m", "cosyexp.train", "--cfg", "job"))["model"]["name"] == "llm"
    assert yaml.safe_load(said("-m", "cosyexp.export", "--cfg", "job"))["weights"] == "best"
