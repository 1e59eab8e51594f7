"""conf/: every file arrives where it is used, every key is read, and every class builds."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import product
from typing import Any, get_type_hints

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from cosyexp import config as schemas
from cosyexp.cli.compose import compose, compose_train
from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.config import EngineConfig, TrainConfig, parse
from cosyexp.data.fields import Mel
from cosyexp.errors import UserError
from cosyexp.registry import build, check, get_class
from tests.support import MODELS, ROOT, config

Keys = tuple[str, ...]  # of a leaf: ("trainer", "steps")
APPS = {
    "train": schemas.TrainConfig,
    "prepare": schemas.PrepareConfig,
    "prefer": schemas.PreferConfig,
    "average": schemas.AverageConfig,
    "compare": schemas.CompareConfig,
    "evaluate": schemas.EvaluateConfig,
    "export/config": schemas.ExportConfig,
    "synthesize": schemas.SynthesizeConfig,
    "push": schemas.PushConfig,
    "pull": schemas.PullConfig,
}
FILES = sorted(
    path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.yaml")
)
OVERLAYS = ("experiment", "hparams_search", "debug")
# the apps that use the files of a group; train uses all others
USED_BY = {
    "hydra": tuple(APPS),
    "family": ("train", "prepare"),
    "tokenizer": ("train", "prepare"),
    "data": ("train", "prefer"),
    "corpus": ("prepare",),
    "speech_tokenizer": ("prepare",),
    "speaker_encoder": ("prepare",),
    "segment": ("prepare",),
    "transcribe": ("prepare",),
    "verify": ("prepare",),
    "method": ("average",),
    "score": ("prefer",),
    "judge": ("evaluate",),
    "export": ("export/config",),
}
# what must be given on the command line, by the start of a file's name
GIVEN = {
    "data/parquet": ["data.train=a.list", "data.valid=b.list"],
    "data/prepared": ["data.dir=prepared"],
    "corpus/table": ["corpus.path=all.csv"],
    "corpus/demo": [],
    "corpus/": ["corpus.root=corpus"],
    "speech_tokenizer/onnx": ["speech_tokenizer.path=a.onnx"],
    "speaker_encoder/onnx": ["speaker_encoder.path=a.onnx"],
    "segment/vad": ["transcribe=whisper"],
}
ALWAYS_GIVEN = {
    "average": ["run_dir=run"],
    "compare": ["run_dir=[run]"],
    "evaluate": ["llm=run"],
    "prefer": ["run_dir=run"],
    "pull": ["repo=me/voice", "out=voice"],
    "push": ["repo=me/voice"],
    "synthesize": ["text=hello"],
}
# nodes that a class is built from, by where they are
ROLES = {
    "network": "network",
    "objective": "objective",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "engine": "engine",
    "method": "method",
    "format": "format",
    "score": "score",
    "corpus": "corpus",
    "data.corpus": "corpus",
    "speech_tokenizer": "front_end",
    "speaker_encoder": "front_end",
    "segment": "segmenter",
    "transcribe": "transcriber",
    "verify": "transcriber",
    "adapter": "adapter",
    "family.tokenizer": "tokenizer",
    "family.sampler": "token_sampler",
    "model.collator": "collator",
    "model.discriminator.optimizer": "optimizer",
    "model.discriminator.scheduler": "scheduler",
    "components.*": "component",
    "logger.*": "logger",
    "callbacks.*": "callback",
    "metrics.*": "metric",
    "judge.*": "judge",
}
# keys of an engine's node that the launcher and `build_trainer` read, not the engine's class
OF_THE_LAUNCHER = {"nproc_per_node", "threads"}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def group_of(file: str) -> str:
    return file.split("/")[0] if "/" in file else ""


def selected_by(file: str) -> list[str]:
    """The overrides that select a file: conf/network/flow_demo.yaml by model=flow family=demo."""
    group, _, name = file.rpartition("/")
    if group == "network":
        model, family = name.split("_")
        return [f"model={model}", f"family={family}"]
    if group == "objective":
        mode, model = name.split("_")
        return [f"mode={mode}", f"model={model}"]
    if group == "tokenizer":
        return [f"tokenizer@family.tokenizer={name}"]
    if file in ("engine/base", "data/base", "hydra/default", "export/config") or not group:
        return []
    return [f"{group.removeprefix('export/')}={name}"]


def words_for(file: str, app: str) -> list[str]:
    """The overrides that select a file in an app, with those that the app then needs."""
    of_file = next((words for start, words in GIVEN.items() if file.startswith(start)), [])
    return [*selected_by(file), *ALWAYS_GIVEN.get(app, []), *of_file]


def uses() -> Iterator[tuple[str, str]]:
    """Every file with each app that uses it."""
    for file in FILES:
        if group_of(file) in ("", "export") and file.removeprefix("export/") in ("config", *APPS):
            yield file, file
        else:
            for app in USED_BY.get(group_of(file), ("train",)):
                yield file, app


USES = list(uses())


# what arrives ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composed:
    """A config as Hydra composes it.

    raw: with Hydra's own node, and without resolving it. values: what the app is given. files:
    those of conf/, in the order in which they are merged, each with the keys and values it sets.
    """

    raw: dict[str, Any]
    values: dict[str, Any]
    files: list[tuple[str, dict[Keys, Any]]]


@cache
def composed(app: str, *words: str) -> Composed:
    register()
    folder, _, name = app.rpartition("/")
    with hydra.initialize_config_dir(
        version_base="1.3", config_dir=str((CONFIG_DIR / folder).resolve())
    ):
        cfg = hydra.compose(name, overrides=list(words), return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        entries = loader.compute_defaults_list(name, list(words), RunMode.RUN).defaults
    raw: Any = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    with open_dict(cfg):
        del cfg["hydra"]
    values: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    files = []
    for entry in entries:
        package = tuple(part for part in (entry.package or "").split(".") if part)
        in_app = f"{folder}/{entry.config_path}".lstrip("/")
        file = in_app if in_app in FILES else str(entry.config_path)
        if file in FILES:
            files.append((file, own_keys(file, package)))
    return Composed(raw, values, files)


def own_keys(file: str, package: Keys) -> dict[Keys, Any]:
    """The keys that a file sets, with their values."""
    own = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{file}.yaml"))
    assert isinstance(own, dict)
    own.pop("defaults", None)
    return dict(leaves(own, package)) if own else {}


def leaves(node: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, node


@pytest.mark.parametrize(("file", "app"), USES)
def test_every_file_arrives_in_its_app(file, app):
    """Each of its values is that of the config, unless a later file of the defaults sets it."""
    found = composed(app, *words_for(file, app))
    names = [name for name, _ in found.files]
    assert file in names
    index = len(names) - 1 - names[::-1].index(file)
    later = {path for _, keys in found.files[index + 1 :] for path in keys}
    arrived = dict(leaves(found.raw))
    for path, value in found.files[index][1].items():
        if value == "???" or path in later:
            assert path in arrived, path
        else:
            assert arrived[path] == value, path


def test_no_file_is_unused():
    assert {file for file, _ in USES} == set(FILES)


@pytest.mark.parametrize("group", ["callbacks", "metrics"])
def test_none_is_nothing(group):
    assert composed("train", f"{group}=none").values[group] == {}


@pytest.mark.parametrize("app", APPS)
def test_every_launcher_and_sweeper_works_in_every_app(app):
    """Their files are found by the search-path plugin also in the export app, below conf/."""
    for group, kind in (("launcher", "launchers"), ("sweeper", "sweepers")):
        for name in options(f"hydra/{group}"):
            node = composed(app, *words_for(f"hydra/{group}/{name}", app)).raw["hydra"][group]
            assert node["_target_"].startswith(f"hydra_plugins.cosyexp.{kind}.")


def test_apps_of_others_do_not_see_our_configs(tmp_path):
    """The search-path plugin is found by every Hydra app of this environment."""
    (tmp_path / "app.yaml").write_text("key: 1\n")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        assert hydra.compose("app") == {"key": 1}
        with pytest.raises(MissingConfigException, match="hydra/sweeper/optuna"):
            hydra.compose("app", overrides=["hydra/sweeper=optuna"])
        sources = GlobalHydra.instance().config_loader().get_search_path().get_path()
    assert not [source for source in sources if source.provider.startswith("cosyexp")]


@pytest.mark.parametrize(
    ("family", "mode", "model"), product(options("family"), options("mode"), MODELS)
)
def test_axes_compose_or_hydra_names_the_options(family, mode, model):
    words = [f"family={family}", f"mode={mode}", f"model={model}"]
    if f"{model}_{family}" in options("network") and f"{mode}_{model}" in options("objective"):
        found = compose_train(words)
        assert (found.family.name, found.mode.name, found.model.name) == (family, mode, model)
    else:
        with pytest.raises(MissingConfigException, match="Available options"):
            compose_train(words)


@pytest.mark.parametrize(
    "group",
    ["family", "model", "mode", "engine", "data", "optimizer", "logger", "callbacks", *OVERLAYS],
)
def test_a_misspelled_option_is_answered_with_the_available_ones(group):
    with pytest.raises(MissingConfigException) as raised:
        compose_train([f"{group}=nothing"])
    assert f"'{group}/nothing'" in str(raised.value) and "Available options" in str(raised.value)
    assert all(option in str(raised.value) for option in options(group))


# overlays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "option", "model"),
    [
        (group, option, model)
        for group in OVERLAYS
        for option in options(group)
        for model in (("llm",) if option == "dpo" else MODELS)  # mode=dpo has no other objective
    ],
)
def test_every_overlay_has_the_last_word_for_every_model(group, option, model):
    words = [f"model={model}", f"{group}={option}"]
    found = composed("train", *words)
    keys = dict(found.files)[f"{group}/{option}"]
    arrived = dict(leaves(found.raw))
    assert {path: arrived.get(path) for path in keys} == keys
    assert parse(TrainConfig, found.values).model.name == model


@pytest.mark.parametrize("group", OVERLAYS)
def test_an_overlay_is_null_by_default(group):
    files = [file for file, _ in composed("train").files]
    assert "train" in files and not [file for file in files if file.startswith(f"{group}/")]
    loaded = OmegaConf.load(CONFIG_DIR / "train.yaml")
    assert {group: None} in OmegaConf.to_container(loaded)["defaults"]  # type: ignore[index, call-overload]


@pytest.mark.parametrize(("family", "model"), product(("demo", "cosyvoice2"), ("llm", "flow")))
def test_finetune_is_a_small_constant_learning_rate(family, model):
    found = compose_train([f"family={family}", f"experiment=finetune_{model}"])
    assert found.model.name == model
    assert (found.optimizer["_target_"], found.optimizer["lr"]) == ("torch.optim.Adam", 1e-5)
    assert "weight_decay" not in found.optimizer
    rate = build(found.scheduler, "scheduler")
    assert [rate(update, 1.0) for update in (0, 1, 99_999)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", options("hparams_search"))
def test_a_search_varies_keys_that_exist(name, model):
    found = composed("train", f"model={model}", f"hparams_search={name}")
    sweeper = found.raw["hydra"]["sweeper"]
    assert sweeper["_target_"] == "hydra_plugins.cosyexp.sweepers.OptunaSweeper"
    known = {".".join(path) for path, _ in leaves(found.values)}
    assert sweeper["params"] and set(sweeper["params"]) <= known


# every key is read -------------------------------------------------------------------------------


def role_of(path: str) -> str | None:
    return next((role for pattern, role in ROLES.items() if fnmatch(path, pattern)), None)


def unread(node: Mapping[str, Any], schema: Any, path: str = "") -> Iterator[str]:
    """The keys that no dataclass declares and no constructor takes.

    Args:
        schema: the dataclass of the node; None where the node is a mapping of names.
    """
    types = get_type_hints(schema) if is_dataclass(schema) else {}
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        if role := role_of(here):
            yield from unread_by_class(value, role, here)
        elif is_dataclass(types.get(str(key))):
            yield from unread(value, types[str(key)], here)
        elif isinstance(value, Mapping) and any(fnmatch(role, f"{here}.*") for role in ROLES):
            yield from unread(value, None, here)
        elif key not in types:
            yield here


def unread_by_class(node: Any, role: str, path: str) -> Iterator[str]:
    if node is None or (node == {} and path != "network"):
        return
    own = {key: value for key, value in node.items() if key not in OF_THE_LAUNCHER}
    try:
        check(own if role == "engine" else node, role)
    except UserError as error:
        yield f"{path}: {error}"


@pytest.mark.parametrize(("file", "app"), USES)
def test_every_key_is_read(file, app):
    values = composed(app, *words_for(file, app)).values
    assert list(unread(values, APPS[app])) == []
    parse(APPS[app], values)  # with values in range


@pytest.mark.parametrize(
    ("path", "node"),
    [
        ("network.widht", {"network": {"widht": 1}}),
        ("trainer.stepz", {"trainer": {"stepz": 1}}),
        ("typo", {"typo": 1}),
        ("callbacks.throughput", {"callbacks": {"throughput": {"evry": 1}}}),
        ("callbacks.mine", {"callbacks": {"mine": {"_target_": "cosyexp.train.main"}}}),
        ("model.collator", {"model": {"collator": {"layout": {"eoss": 1}}}}),
        ("model.discriminator.optimzer", {"model": {"discriminator": {"optimzer": {}}}}),
        ("engine", {"engine": {"stage": 2}}),
    ],
)
def test_a_planted_key_is_found(path, node):
    values = compose("train", ["callbacks=throughput"])
    merged = OmegaConf.to_container(OmegaConf.merge(values, node))
    assert isinstance(merged, dict)
    (found,) = unread(merged, TrainConfig)  # type: ignore[arg-type]
    assert found.startswith(path if path != "network.widht" else "network: network.widht")


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """Each field of a config that code reads, with the class it is read of.

    It is what mypy misses in a copy of the code whose config classes have lost their fields.
    """
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "cosyexp", copy / "cosyexp")
    for path in (copy / "cosyexp/config/apps.py", copy / "cosyexp/config/groups.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                node.body = [line for line in node.body if not is_leaf_field(line)] or [ast.Pass()]
        path.write_text(ast.unparse(tree))
    options = ["--no-site-packages", "--ignore-missing-imports", "--check-untyped-defs"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--explicit-package-bases", "cosyexp"],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    found = re.findall(r'"(\w+)" has no attribute "(\w+)"', result.stdout)
    assert found, result.stdout + result.stderr
    return set(found)


def is_leaf_field(line: ast.stmt) -> bool:
    return isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).endswith("Config")


def unread_fields(reads: set[tuple[str, str]]) -> set[str]:
    """The fields that no code reads of their class, no file of conf/ interpolates, and no class
    takes that is given the whole node."""
    texts = [path.read_text() for path in CONFIG_DIR.rglob("*.yaml")]
    interpolated = {path for text in texts for path in re.findall(r"\$\{([\w.]+)\}", text)}
    given_whole = {
        schemas.MelConfig: set(inspect.signature(Mel).parameters),
        schemas.EngineConfig: set(engine_node("ddp")),  # checked by `test_every_key_is_read`
        schemas.SynthesizeConfig: set(schemas.MODELS),  # by getattr
        schemas.EvaluateConfig: set(schemas.MODELS),
        schemas.ModeConfig: {"name"},  # for the reader of a run's config.yaml
    }
    classes = [*config_classes(), (schemas.EngineConfig, "engine.")]
    unread = set()
    for schema, prefix in classes:
        types = get_type_hints(schema)
        for name in (f.name for f in fields(schema) if not is_dataclass(types[f.name])):
            owner = next(c for c in schema.__mro__ if name in vars(c).get("__annotations__", {}))
            related = {owner.__name__} | {c.__name__ for c, _ in classes if issubclass(c, owner)}
            of_code = any((c, name) in reads for c in related)
            of_files = any(f"{path}.".startswith(f"{prefix}{name}.") for path in interpolated)
            if not (of_code or of_files or name in given_whole.get(schema, ())):
                unread.add(f"{prefix}{name}")
    return unread


def config_classes() -> Iterator[tuple[Any, str]]:
    """The dataclasses of all apps, each with the path of its node."""
    waiting: list[tuple[Any, str]] = [(schema, "") for schema in APPS.values()]
    while waiting:
        schema, prefix = waiting.pop()
        yield schema, prefix
        for name, kind in get_type_hints(schema).items():
            if is_dataclass(kind):
                waiting.append((kind, f"{prefix}{name}."))


def engine_node(name: str) -> dict[str, Any]:
    node = composed("train", f"engine={name}").values["engine"]
    return {key: value for key, value in node.items() if key not in OF_THE_LAUNCHER}


def test_every_field_of_a_config_is_read(reads):
    assert unread_fields(reads) == set()


def test_a_field_that_nothing_reads_is_found(reads):
    assert unread_fields(reads - {("TrainerConfig", "ema")}) == {"trainer.ema"}


def test_a_class_without_arguments_takes_none():
    node = {"_target_": "cosyexp.averaging.methods.Uniform", "temperature": 0.1}
    with pytest.raises(UserError, match=r"method\.temperature is not an argument of Uniform"):
        check(node, "method")


# every class builds ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_optimizer_and_scheduler_builds_and_moves_the_network(model, tmp_path):
    optimizers = set(options("optimizer")) - {"adamw_8bit"}  # needs a GPU
    for optimizer, scheduler in product(sorted(optimizers), options("scheduler")):
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
def test_collators_and_components_build(model, tmp_path):
    cfg = config(model, tmp_path)
    assert build(cfg.model.collator, "collator").fields
    network = build(cfg.network, "network")
    assert cfg.components
    for node in cfg.components.values():
        component = build(node, "component", network)
        assert set(component.dynamic) <= {*component.inputs, *component.outputs}


@pytest.mark.parametrize("engine", options("engine"))
def test_an_engine_takes_what_it_is_built_with(engine):
    """Nothing is missing, and nothing is too much; engines at work: tests/invariants."""
    if engine == "base":
        base = OmegaConf.load(CONFIG_DIR / "engine/base.yaml")
        assert set(base) == {"_partial_", *(f.name for f in fields(EngineConfig))}
        return
    node = engine_node(engine)
    partial = build(node, "engine")
    of_trainer = {"precision": "fp32", "max_grad_norm": 5.0, "ema": None, "running_sum": False}
    inspect.signature(partial.func).bind(**partial.keywords, **of_trainer)
    assert partial.func is get_class(node, "engine")


@pytest.mark.parametrize(
    ("group", "role"), [("logger", "logger"), ("callbacks", "callback"), ("metrics", "metric")]
)
def test_loggers_callbacks_and_metrics_build(group, role):
    for option in options(group):
        for node in (
            composed("train", *words_for(f"{group}/{option}", "train")).values[group].values()
        ):
            assert type(build(node, role)) is get_class(node, role)


@pytest.mark.parametrize(
    ("app", "group", "role"),
    [
        ("average", "method", "method"),
        ("export/config", "export/format", "format"),
        ("prepare", "speech_tokenizer", "front_end"),
        ("prepare", "speaker_encoder", "front_end"),
    ],
)
def test_methods_formats_and_front_ends_build(app, group, role):
    for option in options(group):
        file = f"{group}/{option}"
        node = composed(app, *words_for(file, app)).values[group.split("/")[-1]]
        assert type(build(node, role)) is get_class(node, role)


def test_the_text_vocabulary_of_the_demo_is_the_tokenizer_s():
    """Those of the others: tests/parity/test_tokenizers.py."""
    family = compose_train(["family=demo"]).family
    tokenizer = build(family.tokenizer, "tokenizer")
    assert max(tokenizer.encode(family.tokenizer["alphabet"])) + 1 == family.text_vocabulary
