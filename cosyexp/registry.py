"""The classes that a config may build, by role, and how they are built from a `_target_`.

A config can come from a run directory that someone else wrote, so a `_target_` is looked up here
before anything is called. Each class of cosyexp registers itself for one role; torch's optimizers
and activations are listed by name; packages that the user trusts may define anything:

    trusted=[mylab]                         on the command line or in the user's own config folder
    [project.entry-points."cosyexp.plugins"]     in an installed package's pyproject.toml
    mylab = "mylab"

A list of trusted packages is never read from a run directory.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from cosyexp.arguments import OPTIMIZER, annotations, problem
from cosyexp.errors import UserError

Builder = TypeVar("Builder", bound=Callable[..., Any])

# Each role, and the package or module that holds our classes of it: no other is imported for it.
ROLES = {
    "network": "cosyexp.models",
    "module": "cosyexp.models",
    "component": "cosyexp.models",
    "objective": "cosyexp.objectives",
    "adapter": "cosyexp.training.adapters",
    "collator": "cosyexp.data.collators",
    "layout": "cosyexp.data.layout",
    "tokenizer": "cosyexp.data.tokenizers",
    "token_sampler": "cosyexp.models.llm.sampling",
    "engine": "cosyexp.training.engines",
    "optimizer": "cosyexp.training.optimizers",  # besides torch's
    "scheduler": "cosyexp.training.schedules",
    "logger": "cosyexp.training.loggers",
    "callback": "cosyexp.training.callbacks",
    "metric": "cosyexp.objectives.metrics",
    "method": "cosyexp.averaging.methods",
    "format": "cosyexp.exporting",
    "corpus": "cosyexp.data.corpora",
    "front_end": "cosyexp.data.frontends",
    "segmenter": "cosyexp.data.segmentation",
    "transcriber": "cosyexp.evaluation.transcriber",
    "score": "cosyexp.preferences",
    "judge": "cosyexp.evaluation.judges",
}
# what may stand inside another node: it computes, and touches neither files nor processes
NESTED = ("network", "module", "layout", "tokenizer", "optimizer", "scheduler")
# what else may stand inside a node of a role that only the command line builds
INSIDE = {"callback": ("judge",)}
TORCH = {
    "optimizer": ("Adam", "AdamW", "Adagrad", "NAdam", "RAdam", "RMSprop", "SGD"),
    "module": ("ELU", "GELU", "Identity", "LeakyReLU", "Mish", "ReLU", "SiLU", "Tanh"),
}
LISTED = {
    "optimizer": {f"torch.optim.{name}" for name in TORCH["optimizer"]},
    "module": {f"torch.nn.{name}" for name in TORCH["module"]},
}
# what a constructor raises at values that it cannot use, such as sizes that do not fit
REFUSALS = (ValueError, TypeError, ArithmeticError, IndexError, RuntimeError, MemoryError)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
PLUGINS = "cosyexp.plugins"  # the entry-point group

_registered: dict[str, set[Callable[..., Any]]] = {role: set() for role in ROLES}
_trusted: set[str] = set()


def register(role: str) -> Callable[[Builder], Builder]:
    """Class decorator: configs may build this class, or call this function, in a role."""
    assert role in ROLES, role

    def add(builder: Builder) -> Builder:
        _registered[role].add(builder)
        return builder

    return add


def trust(packages: Iterable[str]) -> None:
    """Lets configs of this process build what these packages define.

    The current folder is added to the import path, so that a package in it is found by the console
    scripts too.

    Raises:
        UserError: a package cannot be imported.
    """
    for package in packages:
        if package in _trusted:
            continue
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            if not all(part.isidentifier() for part in package.split(".")):
                raise ImportError("it is not the name of a package")
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"trusted=[{package}]: the package cannot be imported ({error}): install it, or "
                f"run from the folder that holds it"
            ) from None
        _trusted.add(package)


@cache
def plugins() -> dict[str, str]:
    """Returns the installed packages that declare the entry point `cosyexp.plugins`, by name."""
    return {entry.name: entry.value for entry in entry_points(group=PLUGINS)}


def plugin_config_dirs() -> Iterator[Path]:
    """Yields the `conf/` folder of each plugin package that has one."""
    for package in plugins().values():
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            if (folder := Path(place) / "conf").is_dir():
                yield folder


def build(node: Any, role: str, *args: Any, **kwargs: Any) -> Any:
    """Checks a config node and instantiates it with Hydra.

    Args:
        node: a mapping with `_target_`, the arguments, and perhaps `_partial_: true`.
        role: one of ROLES; the target must be registered for it.
        args, kwargs: more arguments of the call.

    Raises:
        UserError: the target is not registered for the role, an argument is unknown, or the
            constructor refuses a value.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    check(node, role)
    try:
        return hydra.utils.instantiate(node, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = _innermost(error)
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, REFUSALS):
            name, reason = str(node["_target_"]).rsplit(".", 1)[-1], str(cause).splitlines()[:1]
            text = reason[0] if reason else type(cause).__name__
            raise UserError(f"{name} cannot be built with these settings: {text}") from None
        raise


def get_class(node: Any, role: str) -> Any:
    """Checks a config node and returns the class of its target without building it."""
    check(node, role)
    return _find(str(node["_target_"]))


def check(node: Any, role: str, path: str | None = None) -> None:
    """Checks a config node with all nodes inside it; nothing is built.

    Args:
        node, role: as in `build`.
        path: key of the node in the config, for messages; None: that of the role.

    Raises:
        UserError: a target is not registered for its role, or an argument is unknown, has another
            type or is outside its range.
    """
    _check(node, (role,), path or role)


def _check(node: Any, roles: tuple[str, ...], path: str) -> None:
    if isinstance(node, str) and "${" in node:
        # a run's config is resolved; an interpolation could bring in anything
        raise UserError(f"{path} holds the interpolation {node!r}, in which a _target_ could hide")
    if isinstance(node, Mapping):
        if "_target_" in node:
            return _check_target(node, roles, path)
        if len(roles) == 1:
            raise UserError(f"{path} has no _target_: name the class that it builds")
        for key, value in node.items():
            _check(value, roles, f"{path}.{key}")
    elif len(roles) == 1:
        raise UserError(f"{path}={node!r} is not a mapping with a _target_")
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for i, value in enumerate(node):
            _check(value, roles, f"{path}[{i}]")


def _check_target(node: Mapping[Any, Any], roles: tuple[str, ...], path: str) -> None:
    target = node["_target_"]
    kind = roles[0] if len(roles) == 1 else "part of a network or an objective"
    if not isinstance(target, str) or not DOTTED.fullmatch(target):
        raise UserError(f"{path}._target_={target!r} is not the dotted name of a class")
    if not isinstance(partial := node.get("_partial_", False), bool):
        raise UserError(f"{path}._partial_={partial!r} must be true or false")
    listed = any(target in LISTED.get(role, ()) for role in roles)
    own = target.startswith("cosyexp.")
    packages = sorted({*_trusted, *plugins().values()})
    package = next((name for name in packages if target.startswith(f"{name}.")), None)
    refusal = f"{path}._target_={target} is not a registered {kind}"
    if own and not any(target.startswith(f"{ROLES[role]}.") for role in roles):
        raise UserError(refusal)
    if not own and not listed and package is None:
        raise UserError(
            f"{refusal}; if you trust the package, add trusted=[{target.split('.', 1)[0]}] to the "
            f"command"
        )
    found = _find(target)
    if own and not any(found is builder for role in roles for builder in _registered[role]):
        raise UserError(refusal)
    if not own and not listed:
        module = str(getattr(found, "__module__", ""))
        whole = inspect.isclass(found) or inspect.isfunction(found)
        if not whole or not f"{module}.".startswith(f"{package}."):
            raise UserError(f"{path}._target_={target} is not defined in the package {package}")
    inner = (*NESTED, *INSIDE.get(roles[0], ())) if len(roles) == 1 else NESTED
    known, typed = _parameters(found), annotations(found)
    if "optimizer" in roles and listed:
        typed = {**typed, **OPTIMIZER}
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        taken = known is None or key in known
        if not isinstance(key, str) or key.startswith("_") or not taken:
            near = get_close_matches(str(key), known or [])
            hint = f": it takes {', '.join(known) or 'none'}" if known is not None else ""
            hint = f": did you mean {near[0]}?" if near else hint
            raise UserError(f"{path}.{key} is not an argument of {target.split('.')[-1]}{hint}")
        _check(value, inner, f"{path}.{key}")
        if fault := problem(value, typed.get(key, Any), strict=package in ("cosyexp", None)):
            raise UserError(f"{path}.{key}={value} {fault}")


def _find(target: str) -> Any:
    """Imports the module of a dotted name that was checked, and returns what it names."""
    module, _, name = target.rpartition(".")
    try:
        return vars(importlib.import_module(module))[name]
    except (ImportError, KeyError):
        raise UserError(f"_target_={target} does not exist: correct its name") from None


def _parameters(found: Any) -> list[str] | None:
    """Returns the names of all arguments; None if it takes any.

    A class that passes **options to its base takes those of its base too.
    """
    parameters = inspect.signature(found).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        return names
    base = found.__base__ if inspect.isclass(found) else object
    inherited = None if base is object else _parameters(base)
    return None if inherited is None else [*names, *inherited]


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
