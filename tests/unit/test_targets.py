"""No callable outside a role is called, or imported, by any node of a config: thousands are tried.

The names are those of all modules that are imported (of the standard library, torch, hydra,
omegaconf, transformers, ...), those that pkgutil lists for packages, and all of cosyexp's own.
"""

import ast
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

import hydra
import omegaconf
import pytest
import torch
import transformers
from hydra._internal.instantiate import _instantiate2
from hydra.errors import InstantiationException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosyexp import registry
from cosyexp.errors import UserError
from cosyexp.registry import NESTED, ROLES, TORCH, build, get_class
from tests.support import ROOT

PACKAGES = (torch, hydra, omegaconf, transformers)
Called = list[Any]
Places = dict[str, Callable[[Any], Any]]
RELU = "torch.nn.ReLU"
# Where a node stands: at the top, or inside one that is allowed there.
INSIDE: Places = {
    "argument": lambda node: {"inplace": node},
    "list": lambda node: {"inplace": [1, [node]]},
    "mapping": lambda node: {"inplace": {"a": {"b": node}}},
    "nested optimizer": lambda node: {
        "inplace": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": node},
    },
}
# What surrounds the name, in Hydra's and OmegaConf's syntax.
FORMS: Places = {
    "name": lambda name: {"_target_": name},
    "partial": lambda name: {"_target_": name, "_partial_": True},
    "arguments": lambda name: {"_target_": name, "_args_": ["x"]},
    "not recursive": lambda name: {"_target_": name, "_recursive_": False},
    "converted": lambda name: {"_target_": name, "_convert_": "object"},
    "list": lambda name: {"_target_": [name]},
    "node": lambda name: {"_target_": {"_target_": name}},
    "call": lambda name: {"_target_": f"{name}.__call__"},
    "attribute": lambda name: {"_target_": f"{name}.__init__.__globals__"},
    "partial by name": lambda name: {"_target_": "functools.partial", "_args_": [name]},
    "get_method": lambda name: {"_target_": "hydra.utils.get_method", "path": name},
    "interpolation": lambda name: {"_target_": "${.target}", "target": name},
    "created": lambda name: f"${{oc.create:{{_target_: {name}}}}}",
    "decoded": lambda name: {"_target_": f"${{oc.decode:{name}}}"},
}


# names -------------------------------------------------------------------------------------------


@cache
def foreign_names() -> Sequence[str]:
    """A name of each callable outside of cosyexp; nothing is imported for them."""
    names: dict[int, str] = {}
    for module, content in sys.modules.copy().items():
        if module.split(".")[0] not in ("cosyexp", "tests", "__main__"):
            for name, value in list(getattr(content, "__dict__", {}).items()):
                if callable(value):
                    names[id(value)] = f"{module}.{name}"
    modules = (submodules(package.__name__, list(package.__path__)) for package in PACKAGES)
    return sorted({*names.values(), *chain(*modules)})


def submodules(package: str, folders: Sequence[str]) -> Iterator[str]:
    """Yields the names of the modules of a package, which `pkgutil.walk_packages` would import."""
    for module in pkgutil.iter_modules(folders):
        name = f"{package}.{module.name}"
        yield f"{name}.main"
        if module.ispkg:
            yield from submodules(name, [f"{folder}/{module.name}" for folder in folders])


@cache
def own_names() -> Sequence[str]:
    """All names that cosyexp's modules define or import, read from the source."""
    return sorted({f"{module}.{name}" for module, tree in sources() for name in top(tree)})


@cache
def registered() -> dict[str, set[str]]:
    """The names that the source registers for each role."""
    found: dict[str, set[str]] = {role: set() for role in ROLES}
    for role, names in TORCH.items():
        found[role] = {f"{'torch.optim' if role == 'optimizer' else 'torch.nn'}.{n}" for n in names}
    for module, tree in sources():
        for node in tree.body:
            for decorator in getattr(node, "decorator_list", ()):
                if ast.unparse(decorator).startswith("register("):
                    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
                    found[decorator.args[0].value].add(f"{module}.{node.name}")
    return found


@cache
def sources() -> Sequence[tuple[str, ast.Module]]:
    """Name and syntax tree of each module of cosyexp."""
    paths = sorted((ROOT / "cosyexp").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [
        (name.removesuffix(".__init__"), ast.parse(path.read_text()))
        for name, path in zip(names, paths, strict=True)
    ]


def top(tree: ast.Module) -> Iterator[str]:
    """Yields the names that a module defines or imports at its top."""
    yield "__builtins__"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (name.id for name in node.targets if isinstance(name, ast.Name))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name


# what happens ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def called() -> Iterator[Called]:
    """What Hydra calls, which is recorded instead, and what the registry imports."""
    calls: Called = []

    def call(target: Any, *args: Any) -> object:
        calls.append(target)
        return None

    def import_module(name: str) -> Any:
        calls.append(name)
        if name.endswith(".deepspeed"):  # takes seconds
            raise ImportError(name)
        return importlib.import_module(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_instantiate2, "_call_target", call)
        patch.setattr(registry, "importlib", SimpleNamespace(import_module=import_module))
        yield calls


def outside(calls: Called, role: str) -> list[Any]:
    """Returns what was called or imported and does not belong to a role, or inside a node."""
    roles = {role, *NESTED}
    names = {name for kind in roles for name in registered()[kind]}
    builders = [
        vars(sys.modules[m])[n]
        for m, _, n in (x.rpartition(".") for x in names)
        if m in sys.modules
    ]
    packages = [*(f"{ROLES[kind]}." for kind in roles), "torch.nn.", "torch.optim."]
    return [
        call
        for call in calls
        if not (
            any(f"{call}.".startswith(package) for package in packages)
            if isinstance(call, str)
            else any(call is builder for builder in builders)
        )
    ]


def attempt(node: Any, role: str, calls: Called) -> list[Any]:
    """Tries to build a node, and returns what was called or imported outside of the role."""
    calls.clear()
    with suppress(UserError, OmegaConfBaseException, InstantiationException):
        build(node, role)
    return outside(calls, role) if calls else []


@pytest.mark.parametrize("role", ROLES)
def test_nothing_foreign_is_called_or_imported_in_a_role(role, called):
    """Each name is tried in every role."""
    assert len(foreign_names()) > 5000
    for name in foreign_names():
        if found := attempt({"_target_": name}, role, called):
            pytest.fail(f"{role} {name}: {found}")


@pytest.mark.parametrize("role", ROLES)
def test_of_ours_only_what_is_registered_is_called_in_a_role(role, called):
    assert len(own_names()) > 1000
    seen = set()
    for name in own_names():
        assert attempt({"_target_": name}, role, called) == [], name
        seen |= {f"{call.__module__}.{call.__name__}" for call in called if callable(call)}
    ours = {name for name in registered()[role] if name.startswith("cosyexp.")}
    assert seen == {name for name in ours if not name.startswith("cosyexp.training.engines.deep")}


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_nothing_else_is_called_wherever_a_name_stands(data, called):
    name = data.draw(st.sampled_from(foreign_names()) | st.sampled_from(own_names()))
    node = FORMS[data.draw(st.sampled_from(sorted(FORMS)))](name)
    places = data.draw(st.lists(st.sampled_from(sorted(INSIDE)), max_size=2))
    for place in places:
        node = {"_target_": RELU, **INSIDE[place](node)}
    if isinstance(node, dict) and data.draw(st.booleans()):
        node = OmegaConf.create({"node": node}).node
    role = "module" if places else data.draw(st.sampled_from(sorted(ROLES)))
    assert attempt(node, role, called) == []


@pytest.mark.parametrize("name", ["shutil.copy", "cosyexp.run.files.write_text", "torch.load"])
@pytest.mark.parametrize("place", [None, *INSIDE])
def test_a_call_would_be_noticed(name, place, called, monkeypatch):
    """Without the check, the name is called, and the recorder tells."""
    monkeypatch.setattr(registry, "check", lambda node, role: None)
    node = {"_target_": name}
    if place:
        node = {"_target_": RELU, **INSIDE[place](node)}
    assert [call.__name__ for call in attempt(node, "module", called)] == [name.rsplit(".")[-1]]


def test_a_module_that_holds_no_class_of_the_role_is_not_imported(called):
    for name in ("cosyexp.train", "cosyexp.run.files", "cosyexp.training.launch"):
        called.clear()
        for role in ROLES:
            with pytest.raises(UserError, match=f"{name}.main is not a registered {role}"):
                get_class({"_target_": f"{name}.main"}, role)
        assert not called
