"""Typed configs: ranges, types, unknown keys, and what a run directory stores."""

import copy
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, ValidationError

from cosyexp.cli.compose import compose, compose_train
from cosyexp.config import (
    AverageConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ExportConfig,
    ExportedConfig,
    ExportPrecision,
    FamilyConfig,
    MelConfig,
    MetricMode,
    ModelConfig,
    OnNonfinite,
    Precision,
    PreferConfig,
    PrepareConfig,
    Select,
    SynthesizeConfig,
    TrainConfig,
    TrainerConfig,
    engine_config,
    parse,
    setting,
    to_dict,
)
from cosyexp.errors import UserError
from cosyexp.run.directory import FORMAT_VERSION, RunDirectory
from tests.support import MODELS, config
from tests.unit.runs import SMALLEST, add, make_run, smallest_config

GROUPS = [MelConfig, FamilyConfig, ModelConfig, DataConfig, EngineConfig, TrainerConfig]
GROUPS.append(CheckpointConfig)
APPS = [AverageConfig, ExportConfig, PreferConfig, PrepareConfig, SynthesizeConfig]


def bounded() -> Iterator[tuple[type[Any], str, str, float]]:
    """Yields schema, field, sign and bound of every range in the configs."""
    for schema in (*GROUPS, *APPS):
        for field in fields(schema):
            if "list" in str(field.type):  # its items have the range
                continue
            for sign, bound in field.metadata.get("bounds", {}).items():
                yield schema, field.name, sign, bound


BOUNDED = list(bounded())


def types_of(schema: type[Any]) -> dict[str, Any]:
    """Returns the types of all fields, by name."""
    return {field.name: field.type for field in fields(schema)}


def is_float(schema: type[Any], name: str) -> bool:
    """Whether a field is a number with fractions."""
    return "float" in str(types_of(schema)[name])


def required(schema: type[Any]) -> dict[str, Any]:
    """Returns values of the fields that must be given."""
    values: dict[str, Any] = {}
    for name, default in vars(schema()).items():
        if default == "???" or "${" in str(default):
            values[name] = "a"
        elif is_dataclass(default) and (inner := required(type(default))):
            values[name] = inner
    return values


def parsed(schema: type[Any], **values: Any) -> Any:
    """Returns a config with some values, and those that must be given."""
    given = {"text": "hello"} if schema is SynthesizeConfig else {}
    return parse(schema, {**required(schema), **given, **values})


def outside(schema: type[Any], name: str, sign: str, bound: float) -> float:
    """Returns the value nearest to the range, but outside of it."""
    if sign in (">", "<"):
        return bound
    above = sign == "<="
    if is_float(schema, name):
        return math.nextafter(bound, math.inf if above else -math.inf)
    return int(bound) + (1 if above else -1)


def inside(schema: type[Any], name: str, sign: str, bound: float) -> float:
    """Returns the value nearest to the bound within the range."""
    if sign in (">=", "<="):
        return bound if is_float(schema, name) else int(bound)
    above = sign == ">"
    if is_float(schema, name):
        return math.nextafter(bound, math.inf if above else -math.inf)
    return int(bound) + (1 if above else -1)


# ranges ------------------------------------------------------------------------------------------


def test_there_are_ranges_to_try():
    assert len(BOUNDED) > 40 and {sign for _, _, sign, _ in BOUNDED} == {">=", ">", "<=", "<"}


@pytest.mark.parametrize(("schema", "name", "sign", "bound"), BOUNDED)
def test_the_nearest_value_outside_a_range_is_refused(schema, name, sign, bound):
    value = outside(schema, name, sign, bound)
    with pytest.raises(UserError, match=rf"^{name}=.* must be .*{sign} {bound:g}"):
        parsed(schema, **{name: value})


@pytest.mark.parametrize(("schema", "name", "sign", "bound"), BOUNDED)
def test_the_nearest_value_inside_a_range_is_taken(schema, name, sign, bound):
    value = inside(schema, name, sign, bound)
    assert getattr(parsed(schema, **{name: value}), name) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (schema, field.name)
        for schema in (*GROUPS, *APPS)
        for field in fields(schema)
        if is_float(schema, field.name) and "list" not in str(field.type)
    ],
)
def test_numbers_are_finite(schema, name, value):
    """Those without a range too."""
    with pytest.raises(UserError, match=rf"^{name}={value} must be a finite number$"):
        parsed(schema, **{name: value})


def test_a_message_names_the_whole_key_and_what_to_do():
    for values, message in (
        ({"trainer": {"accumulate": 0}}, "^trainer.accumulate=0 must be >= 1$"),
        ({"trainer": {"ema": 1.0}}, "^trainer.ema=1.0 must be > 0 and < 1$"),
        (
            {"trainer": {"max_grad_norm": 0}},
            "^trainer.max_grad_norm=0.0 must be > 0: give null for no clipping$",
        ),
        ({"family": {"mel": {"hop": 0}}}, "^family.mel.hop=0 must be >= 1$"),
        ({"data": {"max_bad": 1.5}}, "^data.max_bad=1.5 must be >= 0 and <= 1$"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            smallest_config(values)


@pytest.mark.parametrize("num", [0, -1])
def test_an_average_is_of_one_checkpoint_or_more(num):
    with pytest.raises(UserError, match=f"^num={num} must be >= 1$"):
        parsed(AverageConfig, num=num)
    assert parsed(AverageConfig, num=None).num is None


def test_a_setting_without_a_range_has_none():
    assert setting(3).metadata["bounds"] == {} and setting(3).default == 3


# types and keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (TrainerConfig, {"steps": "many"}),
        (TrainerConfig, {"steps": 1.5}),
        (TrainerConfig, {"steps": [1]}),
        (TrainerConfig, {"steps": {"a": 1}}),
        (TrainerConfig, {"accumulate": None}),
        (TrainerConfig, {"max_grad_norm": "a little"}),
        (TrainerConfig, {"running_sum": "perhaps"}),
        (TrainerConfig, {"running_sum": None}),
        (TrainerConfig, {"precision": "fp64"}),
        (TrainerConfig, {"on_nonfinite": "ignore"}),
        (FamilyConfig, {"speech_per_text": 1.0}),
        (FamilyConfig, {"speech_per_text": ["a", "b"]}),
        (FamilyConfig, {"tokenizer": "characters"}),
        (AverageConfig, {"select": "worst"}),
        (AverageConfig, {"metric_mode": "middle"}),
        (AverageConfig, {"window": ["a", "b"]}),
        (ExportConfig, {"precision": ["fp64"]}),
        (PrepareConfig, {"cache": "mel"}),
    ],
)
def test_a_value_of_another_type_is_refused(schema, values):
    (name,) = values
    with pytest.raises(ValidationError) as error:
        parsed(schema, **values)
    assert str(error.value.full_key).startswith(name)


def test_a_number_is_not_a_group():
    with pytest.raises(ValidationError, match="int is not a subclass of MelConfig"):
        parse(FamilyConfig, {"mel": 80})


@pytest.mark.parametrize(
    ("schema", "values", "full_key"),
    [
        (TrainerConfig, {"stepz": 1}, "stepz"),
        (FamilyConfig, {"mel": {"hops": 1}}, "mel.hops"),
        (TrainConfig, {"trainer": {"clip": 1}}, "trainer.clip"),
        (TrainConfig, {"typo": 1}, "typo"),
        (TrainConfig, {"format_version": 1}, "format_version"),
    ],
)
def test_an_unknown_key_is_refused(schema, values, full_key):
    with pytest.raises(ConfigKeyError) as error:
        parse(schema, values)
    assert error.value.full_key == full_key


def test_numbers_as_text_are_numbers():
    found = parse(TrainerConfig, {"steps": "7", "max_grad_norm": "1e-1", "running_sum": "true"})
    assert (found.steps, found.max_grad_norm, found.running_sum) == (7, 0.1, True)


@pytest.mark.parametrize(
    ("schema", "name", "choices"),
    [
        (TrainerConfig, "precision", Precision),
        (TrainerConfig, "on_nonfinite", OnNonfinite),
        (AverageConfig, "select", Select),
        (AverageConfig, "metric_mode", MetricMode),
    ],
)
def test_choices_are_given_by_their_names(schema, name, choices):
    for choice in choices:
        assert choice.name == choice.value
        found = parsed(schema, **{name: choice.value})
        assert getattr(found, name) is choice and to_dict(found)[name] == choice.value


def test_the_precisions_of_an_export_are_given_by_their_names():
    names = [choice.name for choice in ExportPrecision]
    found = parsed(ExportConfig, precision=names, tag="")
    assert found.precision == list(ExportPrecision) and to_dict(found)["precision"] == names


def test_nodes_with_a_target_stay_plain():
    node = {"_target_": "os.system", "a": [1, {"b": None}], "c": 0.5}
    found = smallest_config({"network": node}).network
    assert found == node and type(found) is dict and type(found["a"]) is list


# whole configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run_dir": ""}, "run_dir= is empty"),
        ({"trainer": {"steps": None}}, "trainer.steps and trainer.epochs are both null"),
        ({"scheduler": {"steps": None}}, "scheduler.steps is null"),
        ({"data": {"train": None}}, "data.train= is empty"),
        ({"data": {"train": []}}, "data.train= is empty"),
        ({"engine": {"timeout": 0}}, "engine.timeout=0.0 must be > 0"),
    ],
)
def test_settings_that_make_no_run_are_refused(values, message):
    with pytest.raises(UserError, match=f"^{message}"):
        smallest_config(values)


def test_a_run_ends_by_steps_or_by_epochs():
    for trainer in ({"steps": 5}, {"steps": None, "epochs": 2}, {"steps": 0}):
        smallest_config({"trainer": trainer})


@pytest.mark.parametrize(
    ("schema", "key"),
    [(TrainConfig, "run_dir"), (PrepareConfig, "out")],
)
def test_a_required_value_must_be_given(schema, key):
    values = {name: value for name, value in required(schema).items() if name != key}
    with pytest.raises(MissingMandatoryValue) as error:
        parse(schema, {**values, "data": SMALLEST["data"]} if schema is TrainConfig else values)
    assert error.value.full_key == key


FAMILIES = ["demo", "cosyvoice", "cosyvoice2", "cosyvoice3"]
WORDS = [
    *([f"family={family}", f"model={model}"] for family in FAMILIES for model in MODELS),
    ["engine=fsdp", "engine.nproc_per_node=2", "trainer.precision=bf16", "trainer.ema=0.99"],
    ["callbacks=[throughput,early_stopping]", "logger=csv", "trusted=[]", "trainer.epochs=3"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_training_config_survives_the_way_to_a_dict_and_back(words):
    before = compose_train(["data=prepared", "data.dir=unused", *words])
    plain = to_dict(before)
    assert parse(TrainConfig, plain) == before and to_dict(parse(TrainConfig, plain)) == plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


@pytest.mark.parametrize("schema", [*GROUPS, *APPS, ExportedConfig])
def test_the_defaults_survive_the_way_to_a_dict_and_back(schema):
    # the command line resolves interpolations
    resolved = {name: "b" for name, value in vars(schema()).items() if "${" in str(value)}
    before = parsed(schema, **resolved)
    assert parse(schema, to_dict(before)) == before


@pytest.mark.parametrize(
    ("app", "schema", "words"),
    [
        (
            "average",
            AverageConfig,
            ["run_dir=r", "select=window", "window=[1,2]", "metric_mode=max"],
        ),
        ("average", AverageConfig, ["run_dir=r", "method=weighted", "method.temperature=0.5"]),
        ("export/config", ExportConfig, ["precision=[fp32,fp16]", "components=[llm.llm]"]),
        ("export/config", ExportConfig, ["format=jit", "official=cosyvoice2", 'settings=["a=1"]']),
        ("synthesize", SynthesizeConfig, ["text=hello", "backend=jit", "precision=int8"]),
        ("prepare", PrepareConfig, ["corpus=kaldi", "corpus.root=d", "cache=[mel,f0]"]),
        ("prepare", PrepareConfig, []),
        ("prefer", PreferConfig, ["run_dir=r", "data=prepared", "data.dir=d", "score=edit"]),
    ],
)
def test_the_configs_of_the_apps_survive_the_way_to_a_dict_and_back(app, schema, words):
    before = parse(schema, compose(app, words))
    assert parse(schema, to_dict(before)) == before


def test_parsing_changes_no_argument():
    values = {**SMALLEST, "trainer": {"steps": "7"}}
    before = copy.deepcopy(values)
    assert parse(TrainConfig, values).trainer.steps == 7 and values == before


def test_two_configs_share_nothing():
    one, two = smallest_config(), smallest_config()
    one.network["a"] = one.family.mel.hop = 7
    assert two.network == {} and two.family.mel.hop == 256 and smallest_config() == two


def test_every_field_of_a_config_has_a_default():
    """So that an older run can be read after a key is added."""
    for schema in (*GROUPS, *APPS, TrainConfig, ExportedConfig):
        for field in fields(schema):
            assert not (field.default is field.default_factory is MISSING), field.name


# the engine's keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["auto", 1, 2, 64])
def test_nproc_per_node_is_auto_or_a_number_of_processes(value):
    assert engine_config({"nproc_per_node": value}).nproc_per_node == value
    found = smallest_config({"engine": {"nproc_per_node": value}})
    assert engine_config(found.engine).nproc_per_node == value


def test_nproc_per_node_is_auto_by_default():
    assert engine_config({}) == EngineConfig() and EngineConfig().nproc_per_node == "auto"
    assert engine_config(config("llm", Path("data")).engine).nproc_per_node == "auto"


@pytest.mark.parametrize("value", [0, -1])
def test_nproc_per_node_is_at_least_one(value):
    with pytest.raises(
        UserError, match=rf"^engine\.nproc_per_node={value} must be >= 1 and <= 1024$"
    ):
        smallest_config({"engine": {"nproc_per_node": value}})


@pytest.mark.parametrize("value", ["two", "2", "Auto", "", None, True, 1.5, 2.0, [2], {"a": 2}])
def test_nproc_per_node_is_a_whole_number(value):
    with pytest.raises(
        UserError,
        match=r"^engine\.nproc_per_node=.* must be auto or a whole number >= 1 and <= 1024$",
    ):
        smallest_config({"engine": {"nproc_per_node": value}})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nproc_per_node_is_finite(value):
    with pytest.raises(UserError, match=rf"^engine\.nproc_per_node={value} must be a finite"):
        smallest_config({"engine": {"nproc_per_node": value}})


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("2", 2)])
def test_nproc_per_node_on_the_command_line(word, value):
    found = config("llm", Path("data"), f"engine.nproc_per_node={word}")
    assert engine_config(found.engine).nproc_per_node == value


@pytest.mark.parametrize(
    ("engine", "word"),
    [
        *(("ddp", word) for word in ("0", "-1", "two", "'2'", "null", "true", "1.5")),
        ("fsdp", "0"),
        ("deepspeed", "0"),
    ],
)
def test_a_wrong_nproc_per_node_on_the_command_line(engine, word):
    with pytest.raises(UserError, match=r"^engine\.nproc_per_node=.* must be .*>= 1 and <= 1024$"):
        config("llm", Path("data"), f"engine={engine}", f"engine.nproc_per_node={word}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threads": 0}, r"^engine\.threads=0 must be >= 1 and <= 1024$"),
        ({"threads": "all"}, r"^engine\.threads: Value 'all' of type 'str' could not"),
        ({"threads": 1.5}, r"^engine\.threads: Value '1.5' of type 'float' could not"),
        ({"timeout": 0}, r"^engine\.timeout=0.0 must be > 0 and <= 604800$"),
        ({"timeout": math.nan}, r"^engine\.timeout=nan must be a finite number$"),
        ({"timeout": "long"}, r"^engine\.timeout: Value 'long' of type 'str' could not"),
        ({"timeout": None}, r"^engine\.timeout: Incompatible value 'None'"),
        ({"compile": "perhaps"}, r"^engine\.compile: Value 'perhaps' is not a valid bool"),
    ],
)
def test_the_keys_of_all_engines_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        smallest_config({"engine": values})


def test_the_keys_of_one_engine_are_not_those_of_all():
    """They are checked by the class, see test_registry.py."""
    engine = {"_target_": "a.b", "stage": 2, "timeout": 5}
    assert engine_config(engine) == EngineConfig(timeout=5.0)


# run directories ---------------------------------------------------------------------------------


def stored(run: RunDirectory) -> dict[str, Any]:
    """Returns the content of a run's config.yaml."""
    values: dict[str, Any] = yaml.safe_load((run.path / "config.yaml").read_text())
    return values


def store(run: RunDirectory, values: dict[str, Any]) -> None:
    """Replaces the content of a run's config.yaml."""
    (run.path / "config.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("model", MODELS)
def test_a_run_stores_its_config_and_overrides(tmp_path, model):
    words = [f"run_dir={tmp_path}", "trainer.precision=bf16", "optimizer.lr=1e-5"]
    before, run = config(model, Path("data"), *words), RunDirectory(tmp_path)
    run.write_config(before, words)
    assert RunDirectory(tmp_path).config() == before
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text()) == words
    assert (tmp_path / "config.yaml").read_text().startswith(f"format_version: {FORMAT_VERSION}\n")
    of_the_command = {"trusted": [], "resume": {"change": []}, "plan": False}
    assert {**stored(run), **of_the_command} == {
        "format_version": FORMAT_VERSION,
        **to_dict(before),
    }


@pytest.mark.parametrize(
    "version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1, "1", None, [1], 0.5, "new"]
)
def test_a_run_of_another_format_version_is_refused(tmp_path, version):
    run = make_run(tmp_path)
    store(run, {**stored(run), "format_version": version})
    with pytest.raises(UserError) as error:
        run.config()
    assert str(error.value).startswith(
        f"{tmp_path} has format version {version}, this cosyexp reads {FORMAT_VERSION}: use the "
        f"version of cosyexp that wrote it"
    )
    assert "\n" not in str(error.value)


def test_a_run_without_a_format_version_is_refused(tmp_path):
    """It is older than the versions."""
    run = make_run(tmp_path)
    store(run, {key: value for key, value in stored(run).items() if key != "format_version"})
    with pytest.raises(UserError, match="has format version 0, this cosyexp reads 1"):
        run.config()


def test_a_run_of_another_version_cannot_be_resumed(tmp_path):
    run = make_run(tmp_path)
    add(run, 1)
    store(run, {**stored(run), "format_version": 2})
    with pytest.raises(UserError, match="has format version 2"):
        run.refuse_other(smallest_config())


def test_what_is_trusted_is_never_stored(tmp_path):
    run = make_run(tmp_path, smallest_config({"trusted": ["mylab"]}))
    assert "trusted" not in stored(run) and "mylab" not in (tmp_path / "config.yaml").read_text()
    assert run.config().trusted == []


@pytest.mark.parametrize("trusted", [["evil"], "evil", 7, None, {"a": 1}])
def test_what_is_trusted_is_never_read_from_a_run(tmp_path, trusted):
    run = make_run(tmp_path)
    store(run, {**stored(run), "trusted": trusted})
    assert run.config() == smallest_config() and run.config().trusted == []


def test_trust_is_no_change_of_a_run(tmp_path):
    run = make_run(tmp_path, smallest_config({"trusted": ["mylab"]}))
    for trusted in ([], ["mylab"], ["other"]):
        run.refuse_other(smallest_config({"trusted": trusted}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typo": 1}, "is not the config of a run .*typo.*: restore it$"),
        ({"trainer": {"steps": "many"}}, "is not the config of a run .*'many'.*: restore it$"),
        ({"trainer": 7}, "is not the config of a run .*: restore it$"),
        ({"trainer": {"accumulate": 0}}, "trainer.accumulate=0 must be >= 1$"),
        ({"trainer": {"ema": math.nan}}, "trainer.ema=nan must be a finite number$"),
        ({"data": {"train": None, "valid": None, "dir": None}}, "data.train= is empty"),
    ],
)
def test_a_run_with_a_damaged_config_is_refused(tmp_path, change, message):
    run = make_run(tmp_path)
    store(run, {**stored(run), **change})
    with pytest.raises(UserError, match=message) as error:
        run.config()
    assert "\n" not in str(error.value)
