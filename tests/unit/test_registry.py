"""What a config may build: roles, arguments, nested nodes, trusted packages, plugins."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from cosyexp import registry
from cosyexp.cli.compose import compose_train
from cosyexp.cli.hydra_app import CONFIG_DIR
from cosyexp.errors import UserError
from cosyexp.models.layers.encoder import Encoder
from cosyexp.registry import NESTED, ROLES, TORCH, build, check, get_class, register, trust
from tests.support import MODELS

ENCODER: dict[str, Any] = {
    "_target_": "cosyexp.models.layers.encoder.Encoder",
    "in_width": 4,
    "width": 4,
    "heads": 2,
    "hidden": 4,
    "blocks": 1,
}
RELU: dict[str, Any] = {"_target_": "torch.nn.ReLU"}


@pytest.fixture(autouse=True)
def nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undoes what a test trusts, imports, or registers."""
    modules = set(sys.modules)
    monkeypatch.setattr(registry, "_trusted", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    registry.plugins.cache_clear()
    yield
    registry.plugins.cache_clear()
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("mylab", "mylab2", "evil"):
            del sys.modules[name]


# roles -------------------------------------------------------------------------------------------

# a target of each role
TARGETS = {
    "network": "cosyexp.models.llm.transformer_lm.TransformerLM",
    "module": "cosyexp.models.layers.encoder.Encoder",
    "component": "cosyexp.models.hifigan.components.Vocoder",
    "objective": "cosyexp.objectives.language.Language",
    "collator": "cosyexp.data.collators.llm.LanguageCollator",
    "layout": "cosyexp.data.layout.Layout",
    "tokenizer": "cosyexp.data.tokenizers.CharacterTokenizer",
    "token_sampler": "cosyexp.models.llm.sampling.nucleus",
    "engine": "cosyexp.training.engines.ddp.DDP",
    "optimizer": "torch.optim.AdamW",
    "scheduler": "cosyexp.training.schedules.warmup",
    "logger": "cosyexp.training.loggers.jsonl.JsonLines",
    "callback": "cosyexp.training.callbacks.throughput.Throughput",
    "metric": "cosyexp.objectives.metrics.TopKAccuracy",
    "method": "cosyexp.averaging.methods.Uniform",
    "format": "cosyexp.exporting.jit.Jit",
    "corpus": "cosyexp.data.corpora.demo.Demo",
    "front_end": "cosyexp.data.frontends.kmeans.KMeans",
    "score": "cosyexp.preferences.scores.EditDistance",
    "judge": "cosyexp.evaluation.judges.mos.DistillMOS",
    "adapter": "cosyexp.training.adapters.Lora",
    "segmenter": "cosyexp.data.segmentation.PauseSegmenter",
    "transcriber": "cosyexp.evaluation.transcriber.WhisperTranscriber",
}


def test_every_role_is_tried():
    assert set(TARGETS) == set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_a_class_is_built_in_its_own_role_and_in_no_other(role):
    node = {"_target_": TARGETS[role]}
    check(node, role)
    assert get_class(node, role).__name__ == TARGETS[role].rsplit(".", 1)[1]
    for other in set(ROLES) - {role}:
        for refused in (check, get_class, build):
            with pytest.raises(
                UserError, match=rf"^{other}\._target_={TARGETS[role]} is not a registered {other}"
            ):
                refused(node, other)


@pytest.mark.parametrize("role", TORCH)
def test_optimizers_and_activations_of_torch_are_listed(role):
    package = {"optimizer": torch.optim, "module": nn}[role]
    for name in TORCH[role]:
        assert get_class({"_target_": f"{package.__name__}.{name}"}, role) is getattr(package, name)


def test_a_name_that_is_not_a_role_cannot_be_registered():
    with pytest.raises(AssertionError, match="netwrok"):
        register("netwrok")


REFUSED = [
    # of other packages
    "os.system",
    "builtins.eval",
    "subprocess.check_output",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Linear",
    "torch.nn.Module.load_state_dict",
    "torch.nn.modules.module.torch.load",
    "torch.optim.adamw.AdamW",
    "torch.optim.AdamW.__init__",
    "torch.nnx.Linear",
    "cosyexpx.Thing",
    "hydra_plugins.cosyexp.launchers.LocalLauncher",
    "tests.support.command",
    # our own functions, methods, constants and modules
    "cosyexp.run.environment.git",
    "cosyexp.run.files.write_text",
    "cosyexp.run.files.write_text.__globals__",
    "cosyexp.training.build.train",
    "cosyexp.training.launch.launch",
    "cosyexp.registry.trust",
    "cosyexp.registry.register",
    "cosyexp.registry.ROLES",
    "cosyexp.registry.LISTED",
    "cosyexp.errors.UserError",
    "cosyexp.errors.UserError.__class__",
    "cosyexp.models.layers.encoder.Encoder.load_state_dict",
    "cosyexp.run.checkpoint",
    "cosyexp.run",
    # what our modules import
    "cosyexp.run.checkpoint.shutil.rmtree",
    "cosyexp.run.checkpoint.shutil",
    "cosyexp.run.files.os.system",
    "cosyexp.run.directory.Path",
    "cosyexp.registry.os",
    # what does not exist
    "cosyexp.models.no_such_thing",
    "cosyexp.no_such_module.Thing",
    # what is not a dotted name
    "cosyexp",
    "cosyexp.",
    ".cosyexp.run",
    "cosyexp..run",
    "cosyexp.run:git",
    "os.system('x')",
    "torch.nn.ReLU ",
    "torch.nn.ReLU\n",
    "",
    None,
    7,
    ["torch.nn.ReLU"],
]
PLACES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda node: node,
    "argument": lambda node: {**RELU, "inplace": node},
    "mapping": lambda node: {**RELU, "inplace": {"a": {"b": node}}},
    "list": lambda node: {**RELU, "inplace": [1, [node]]},
    "tuple": lambda node: {**RELU, "inplace": (1, ({"a": node},))},
    "argument of a nested node": lambda node: {**RELU, "inplace": {**RELU, "inplace": [node]}},
    "list of a DictConfig": lambda node: OmegaConf.create({**RELU, "inplace": [{"a": [node]}]}),
}


@pytest.mark.parametrize("target", REFUSED)
@pytest.mark.parametrize("role", ["module", "network", "objective"])
def test_nothing_else_is_built_wherever_it_stands(role, target):
    node = {"_target_": target}
    with pytest.raises(UserError, match="_target_"):
        build(node, role)
    if role == "module":
        for place in PLACES.values():
            with pytest.raises(UserError, match="_target_"):
                check(place(node), role)


@pytest.mark.parametrize("place", PLACES)
def test_an_error_names_the_place_of_the_node(place):
    path = {
        "itself": "",
        "argument": ".inplace",
        "mapping": ".inplace.a.b",
        "list": ".inplace[1][0]",
        "tuple": ".inplace[1][0].a",
        "argument of a nested node": ".inplace.inplace[0]",
        "list of a DictConfig": ".inplace[0].a[0]",
    }[place]
    with pytest.raises(UserError) as error:
        check(PLACES[place]({"_target_": "os.system"}), "module")
    assert str(error.value).startswith(f"module{path}._target_=os.system is not a registered ")


@pytest.mark.parametrize("node", [None, "torch.nn.ReLU", 7, [RELU], {}, {"inplace": True}])
def test_a_node_without_a_target_is_refused(node):
    with pytest.raises(UserError, match=r"^module.*_target_"):
        build(node, "module")


def test_a_config_cannot_run_a_command(tmp_path):
    words = ["-c", f"alias.x=!touch {tmp_path}/executed", "x"]
    with pytest.raises(
        UserError, match=r"cosyexp\.run\.environment\.git is not a registered module"
    ):
        build({"_target_": "cosyexp.run.environment.git", "_args_": words}, "module")
    assert not list(tmp_path.iterdir())


# nested nodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", NESTED)
def test_parts_of_a_network_may_stand_inside_a_node(role):
    node = {**RELU, "inplace": {"_target_": TARGETS[role]}}
    if role == "network":
        node["inplace"] = {"_target_": TARGETS["module"]}
    check(node, "module")


@pytest.mark.parametrize("role", sorted(set(ROLES) - set(NESTED)))
def test_what_touches_files_or_processes_may_not_stand_inside_a_node(role):
    with pytest.raises(
        UserError, match=r"module\.inplace\._target_=.* is not a registered part of"
    ):
        check({**RELU, "inplace": {"_target_": TARGETS[role]}}, "module")


def test_a_judge_may_stand_inside_a_callback_and_nothing_else():
    judges = {"judges": {"mos": {"_target_": TARGETS["judge"]}}}
    evaluate = {"_target_": "cosyexp.training.callbacks.evaluate.Evaluate", "valid": "a.list"}
    check({**evaluate, **judges}, "callback")
    refused = r"\.mos\._target_=.* is not a registered part of"
    inside = {**RELU, "inplace": judges["judges"]}
    for node, role in (({**evaluate, "judges": {"a": inside}}, "callback"), (inside, "module")):
        with pytest.raises(UserError, match=refused):
            check(node, role)


def test_nested_nodes_are_built_from_the_inside():
    node = {"_target_": TARGETS["component"], "network": {"_target_": "torch.nn.Tanh"}}
    component = build(node, "component")
    assert type(component).__name__ == "Vocoder" and isinstance(component.network, nn.Tanh)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", ["demo", "cosyvoice", "cosyvoice2", "cosyvoice3"])
def test_the_nodes_of_all_families_are_allowed(model, family):
    config = compose_train(
        [f"family={family}", f"model={model}", "data=prepared", "data.dir=unused"]
    )
    check(config.network, "network")
    check(config.objective, "objective")
    check(config.model.collator, "collator")
    check(config.family.tokenizer, "tokenizer")
    check(config.family.sampler, "token_sampler")
    for node in config.components.values():
        check(node, "component")


# arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "role", "message"),
    [
        (
            {"_target_": "torch.optim.AdamW", "lrr": 1},
            "optimizer",
            "optimizer.lrr is not an argument of AdamW: did you mean lr?",
        ),
        (
            {**ENCODER, "zzz": 1},
            "module",
            "module.zzz is not an argument of Encoder: it takes in_width, width, heads, hidden, ",
        ),
        (
            {**RELU, "inplace": {**ENCODER, "head": 1}},
            "module",
            "module.inplace.head is not an argument of Encoder: did you mean heads?",
        ),
        (
            {"_target_": TARGETS["scheduler"], "_partial_": True, "step": 1},
            "scheduler",
            "scheduler.step is not an argument of warmup: did you mean steps?",
        ),
        (
            {"_target_": TARGETS["score"], "foo": 1},
            "score",
            "score.foo is not an argument of EditDistance: it takes none",
        ),
        # of its base class, which takes **options
        (
            {"_target_": TARGETS["engine"], "_partial_": True, "activation_checkpoint": True},
            "engine",
            "engine.activation_checkpoint is not an argument of DDP: did you mean "
            "activation_checkpointing?",
        ),
        (
            {"_target_": "torch.nn.ReLU", 7: 1},
            "module",
            "module.7 is not an argument of ReLU: it takes inplace",
        ),
    ],
)
def test_an_unknown_argument_is_refused_with_a_hint(node, role, message):
    for refused in (check, get_class, build):
        with pytest.raises(UserError) as error:
            refused(node, role)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "key", ["_args_", "_recursive_", "_convert_", "_call_", "__class__", "_inplace_"]
)
@pytest.mark.parametrize("node", [RELU, {"_target_": "torch.nn.Identity"}], ids=["known", "any"])
def test_hydra_s_own_arguments_are_refused(node, key):
    """Even of a class that takes any argument; only _partial_ is allowed."""
    name = node["_target_"].rsplit(".", 1)[1]
    for value in ([1], True, "all"):
        with pytest.raises(UserError, match=rf"^module\.{key} is not an argument of {name}"):
            build({**node, key: value}, "module")


def test_a_class_may_take_any_argument():
    assert isinstance(
        build({"_target_": "torch.nn.Identity", "anything": 1}, "module"), nn.Identity
    )


def test_a_class_takes_the_arguments_of_its_base():
    engine = build({"_target_": TARGETS["engine"], "_partial_": True, "compile": True}, "engine")
    assert isinstance(engine, partial) and engine.keywords == {"compile": True}


def test_partial_gives_a_function_of_the_other_arguments():
    warmup = build({"_target_": TARGETS["scheduler"], "_partial_": True, "steps": 4}, "scheduler")
    assert warmup(1, 1.0) == 0.5


@pytest.mark.parametrize("value", ["x", 1, None, [True], {"a": 1}])
def test_partial_is_true_or_false(value):
    with pytest.raises(UserError, match=r"module\._partial_=.* must be true or false"):
        build({**RELU, "_partial_": value}, "module")


def test_more_arguments_may_be_given_in_the_call():
    optimizer = build(
        {"_target_": "torch.optim.SGD", "lr": 0.5}, "optimizer", [nn.Parameter(torch.ones(1))]
    )
    assert optimizer.defaults["lr"] == 0.5
    encoder = build({**ENCODER, "width": 4}, "module", width=6)
    assert isinstance(encoder, Encoder) and encoder.width == 6


def test_containers_of_arguments_are_plain():
    node = {"_target_": "torch.nn.Identity", "_partial_": True, "sizes": [1, {"a": [2]}]}
    keywords = build(OmegaConf.create(node), "module").keywords
    assert keywords == {"sizes": [1, {"a": [2]}]}
    assert type(keywords["sizes"]) is list and type(keywords["sizes"][1]) is dict


@pytest.mark.parametrize(
    ("node", "role", "message"),
    [
        (
            {**ENCODER, "width": 5},
            "module",
            "Encoder cannot be built with these settings: width=5 must be a multiple of heads=2",
        ),
        (
            {"_target_": TARGETS["module"]},
            "module",
            "Encoder cannot be built with these settings: .*missing 5 required positional",
        ),
        # the class raises a UserError itself
        (
            {
                "_target_": "cosyexp.preferences.asr_score.WordErrorRate",
                "llm": "a",
                "flow": None,
                "hifigan": None,
            },
            "score",
            "^score=wer synthesizes the candidates",
        ),
    ],
)
def test_a_value_that_the_class_refuses_is_an_error_of_the_user(node, role, message):
    with pytest.raises(UserError, match=message):
        build(node, role)


# interpolations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "a ${b}", ["${b}"], {"a": {"b": "${c}"}}, "\\${escaped}", "${"],
)
def test_an_interpolation_is_refused(value):
    with pytest.raises(UserError, match=r"module\.x.* holds the interpolation .*\$\{"):
        build({"_target_": "torch.nn.Identity", "x": value}, "module")


@pytest.mark.parametrize("of_config", [False, True])
def test_an_interpolation_cannot_bring_a_target_in(tmp_path, of_config):
    path = f"{{_target_: pathlib.Path, _args_: [{tmp_path}/executed]}}"
    node: Any = {
        "_target_": "torch.nn.Identity",
        "x": f"${{oc.create:{{_target_: pathlib.Path.touch, _args_: [{path}]}}}}",
    }
    with pytest.raises(UserError, match=r"^module\.x"):
        build(OmegaConf.create(node) if of_config else node, "module")
    assert not list(tmp_path.iterdir())


# trusted packages --------------------------------------------------------------------------------

MODULE = """
from pathlib import Path

import torch
from torch import nn, load
from torch.nn import Linear

from cosyexp.models.layers.encoder import Encoder

Path({folder!r}, "{name} was imported").touch()
CONSTANT = 7
alias = nn.Tanh


class Net(nn.Module):
    def __init__(self, width: int = 3, inner: object = None) -> None:
        super().__init__()
        self.width, self.inner = width, inner

    def method(self): ...


def make(width: int) -> Net:
    return Net(width)


instance = Net()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package in the current folder, which notes its import in a file."""
    write_package(tmp_path, "mylab")
    monkeypatch.chdir(tmp_path)
    return "mylab"


def write_package(folder: Path, name: str) -> None:
    """Writes a package with the module `nets`."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    (folder / name / "nets.py").write_text(MODULE.format(folder=str(folder), name=name))


def was_imported(name: str) -> bool:
    """Whether the module `nets` of a package was imported."""
    return Path(f"{name} was imported").exists()


@pytest.mark.parametrize("role", ROLES)
def test_a_trusted_package_may_define_anything(package, role):
    trust([package])
    node = {"_target_": "mylab.nets.Net", "width": 5, "inner": {"_target_": "mylab.nets.Net"}}
    net = build(node, role)
    assert (net.width, net.inner.width) == (5, 3) and was_imported(package)
    assert build({"_target_": "mylab.nets.make", "width": 2}, role).width == 2
    with pytest.raises(UserError, match=rf"{role}\.widht is not an argument of Net: did you mean"):
        check({"_target_": "mylab.nets.Net", "widht": 5}, role)


def test_a_package_must_be_trusted_before_anything_of_it_is_imported(package):
    sys.path.insert(0, str(Path.cwd()))
    for refused in (check, get_class, build):
        with pytest.raises(
            UserError,
            match=r"module\._target_=mylab\.nets\.Net is not a registered module; if you trust the "
            r"package, add trusted=\[mylab\] to the command",
        ):
            refused({"_target_": "mylab.nets.Net"}, "module")
    assert not was_imported(package) and "mylab" not in sys.modules


def test_what_stands_inside_a_node_is_not_imported_either(package):
    sys.path.insert(0, str(Path.cwd()))
    for place in PLACES.values():
        with pytest.raises(UserError, match=r"_target_=mylab\.nets\.Net is not a registered"):
            build(place({"_target_": "mylab.nets.Net"}), "module")
    assert not was_imported(package) and "mylab" not in sys.modules


def test_one_package_does_not_vouch_for_another(package, tmp_path):
    write_package(tmp_path, "mylab2")
    trust([package])
    sys.path.insert(0, str(tmp_path))
    for target in ("mylab2.nets.Net", "mylabs.Net", "mylab_nets.Net"):
        with pytest.raises(UserError, match=r"is not a registered module; if you trust"):
            build({"_target_": target}, "module")
    assert not was_imported("mylab2")


@pytest.mark.parametrize(
    "name",
    ["load", "Linear", "Encoder", "alias", "Path", "torch", "nn", "CONSTANT", "instance"],
)
def test_a_trusted_package_does_not_vouch_for_what_it_imports(package, name):
    trust([package])
    with pytest.raises(
        UserError, match=rf"module\._target_=mylab\.nets\.{name} is not defined in the package"
    ):
        build({"_target_": f"mylab.nets.{name}"}, "module")


@pytest.mark.parametrize("name", ["Nothing", "Net.method", "torch.load", "Net.__init__"])
def test_a_name_that_a_trusted_package_does_not_define_is_named(package, name):
    trust([package])
    with pytest.raises(UserError, match=rf"_target_=mylab\.nets\.{name} does not exist"):
        build({"_target_": f"mylab.nets.{name}"}, "module")


def test_a_part_of_a_package_can_be_trusted(package):
    trust(["mylab.nets"])
    assert build({"_target_": "mylab.nets.Net"}, "module").width == 3
    with pytest.raises(UserError, match=r"add trusted=\[mylab\] to the command"):
        build({"_target_": "mylab.other.Net"}, "module")


@pytest.mark.parametrize("name", ["no_such_package", "", ".mylab", "my lab", "mylab/nets", "os;x"])
def test_a_package_that_cannot_be_imported_is_named(name):
    with pytest.raises(
        UserError, match=r"^trusted=\[.*\]: the package cannot be imported"
    ) as error:
        trust([name])
    assert f"trusted=[{name}]" in str(error.value)


def test_trusting_twice_imports_once(package):
    trust([package, package])
    trust([package])
    assert sys.path.count(str(Path.cwd())) == 1


def test_a_trusted_class_need_not_be_registered_but_ours_must(package):
    """Trust in another package gives no role to our own functions."""
    trust([package])
    with pytest.raises(UserError, match="write_text is not a registered module"):
        build({"_target_": "cosyexp.run.files.write_text"}, "module")


# plugins -----------------------------------------------------------------------------------------


@pytest.fixture
def plugin(package: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that is installed as a plugin."""
    sys.path.insert(0, str(Path.cwd()))
    install(monkeypatch, my_plugin=package)
    return package


def install(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    """Lets packages declare the entry point of plugins."""

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "cosyexp.plugins"
        return [EntryPoint(name, value, group) for name, value in packages.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry.plugins.cache_clear()


def test_a_plugin_is_trusted_without_a_word(plugin):
    assert registry.plugins() == {"my_plugin": "mylab"}
    assert build({"_target_": "mylab.nets.Net", "width": 4}, "network").width == 4


def test_a_plugin_is_imported_only_when_it_is_built(plugin):
    registry.plugins()
    assert list(registry.plugin_config_dirs()) == [] and not was_imported(plugin)
    build({"_target_": "mylab.nets.Net"}, "network")
    assert was_imported(plugin)


def test_a_plugin_does_not_vouch_for_other_packages(plugin, tmp_path):
    write_package(tmp_path, "evil")
    for target in ("evil.nets.Net", "mylab.nets.load", "mylab.nets.Encoder"):
        with pytest.raises(UserError, match=f"_target_={target} is not"):
            build({"_target_": target}, "network")
    assert not was_imported("evil")


def test_the_configs_of_a_plugin_are_found(plugin, monkeypatch):
    folder = Path("mylab/conf/network")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: mylab.nets.Net\nwidth: 9\n")
    install(monkeypatch, one=plugin, missing="no_such_plugin", file="json")
    assert [path.resolve() for path in registry.plugin_config_dirs()] == [folder.parent.resolve()]
    config = compose_train(["network=mine", "data=prepared", "data.dir=unused"])
    assert config.network == {"_target_": "mylab.nets.Net", "width": 9}
    assert build(config.network, "network").width == 9


def test_without_plugins_there_are_none(monkeypatch):
    install(monkeypatch)
    assert registry.plugins() == {} and list(registry.plugin_config_dirs()) == []


# every target in conf/ ---------------------------------------------------------------------------


def test_every_target_in_conf_is_registered():
    import yaml

    def targets(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(target := node.get("_target_"), str):
                yield target
            for value in node.values():
                yield from targets(value)
        elif isinstance(node, list):
            for value in node:
                yield from targets(value)

    found = {
        target
        for path in CONFIG_DIR.rglob("*.yaml")
        if "hydra" not in path.relative_to(CONFIG_DIR).parts
        for target in targets(yaml.safe_load(path.read_text()))
        if "${" not in target
    }
    assert len(found) > 50

    def is_registered(target: str) -> bool:
        for role in ROLES:
            try:
                get_class({"_target_": target}, role)
                return True
            except UserError:
                continue
        return False

    assert [target for target in sorted(found) if not is_registered(target)] == []
