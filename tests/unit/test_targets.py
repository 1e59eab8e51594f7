"""What a config may build."""

import pytest
from cosyexp.registry import build, check

from cosyexp.errors import UserError

ALLOWED = [
    "torch.optim.AdamW",
    "torch.nn.Linear",
    "cosyexp.training.schedules.warmup",
    "cosyexp.models.layers.encoder.Encoder",
]
REFUSED = [
    "os.system",
    "builtins.eval",
    "subprocess.check_output",
    "torch.load",
    "torch.nnx.Linear",
    "cosyexpx.Thing",
    "cosyexp.run.checkpoint.shutil.rmtree",
    "cosyexp.run.files.os.system",
    "cosyexp.run.directory.Path",
    "torch.nn.modules.module.torch.load",
    "cosyexp.errors.UserError.__class__",
    "cosyexp.errors.UserError.__base__",
    "torch.nn.Module.__init__",
    "torch.nn.Module.__reduce_ex__",
    "torch.nn.Module.load_state_dict",
    "cosyexp.run.files.write_text.__globals__",
    "cosyexp.run.environment.git",
    "cosyexp.training.session.run",
    "cosyexp.run.checkpoint",
    "cosyexp.models.no_such_thing",
    "cosyexp.",
    "cosyexp..run",
    "",
    None,
    7,
]


@pytest.mark.parametrize("target", ALLOWED)
def test_our_own_and_torch_s_building_blocks_are_allowed(target):
    check_targets({"_target_": target})


PLACES = [
    lambda x: x,
    lambda x: {"a": {"b": x}},
    lambda x: [1, [x]],
    lambda x: {"_target_": ALLOWED[1], "a": ({"b": [x]},)},
]


@pytest.mark.parametrize("target", REFUSED)
def test_nothing_else_is_built_wherever_it_stands(target):
    for place in PLACES:
        with pytest.raises(UserError, match="_target_"):
            check_targets(place({"_target_": target}))


def test_a_config_cannot_run_a_command(tmp_path):
    words = ["-c", f"alias.x=!touch {tmp_path}/executed", "x"]
    with pytest.raises(UserError):
        build({"_target_": "cosyexp.run.environment.git", "_args_": words})
    assert not list(tmp_path.iterdir())


def test_an_interpolation_cannot_bring_a_target_in(tmp_path):
    path = f"{{_target_: pathlib.Path, _args_: [{tmp_path}/executed]}}"
    config = {
        "_target_": "torch.nn.Identity",
        "x": f"${{oc.create:{{_target_: pathlib.Path.touch, _args_: [{path}]}}}}",
    }
    with pytest.raises(UserError):
        build(config)
    assert not list(tmp_path.iterdir())


def test_more_packages_are_trusted_on_request_alone():
    with pytest.raises(UserError, match=r"collections\.Counter"):
        check_targets({"_target_": "collections.Counter"})
    check_targets({"_target_": "collections.Counter"}, trusted=["collections"])
