"""What runs the components of a run: PyTorch from its weights, or the files that were exported from it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import component_class, load_components
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.verify import eager
from cosyexp.run.directory import RunDirectory
from cosyexp.run.weights import find_weights

Outputs = tuple[Tensor, ...]
FORMATS: Mapping[str, type[ComponentFormat]] = {"onnx": Onnx, "jit": Jit}


class Runner:
    """A component, called with inputs by name; it takes those that it has."""

    def __init__(self, inputs: Sequence[str], function: Callable[..., Outputs]) -> None:
        self.inputs, self.function = inputs, function

    def __call__(self, **given: Tensor) -> Outputs:
        return self.function(*(given[name] for name in self.inputs))


def load_runners(run: RunDirectory, backend: str, weights: str) -> Mapping[str, Runner]:
    """The components of a run. `weights` is read by the torch backend alone."""
    if backend == "torch":
        components = load_components(run, find_weights(run, weights))
        return {name: Runner(component.inputs, partial(eager, component)) for name, component in components.items()}
    form = FORMATS[backend]()
    runners = {}
    for name, node in run.config()["components"].items():
        path = run.exports / form.name / f"{name}.fp32.{form.suffix}"
        if not path.exists():
            raise UserError(f"{run} has no {path.name}: python -m cosyexp.export run_dir={run} format={backend}")
        runners[name] = Runner(component_class(node).inputs, _load(form, path))
    return runners


def _load(form: ComponentFormat, path: Path) -> Callable[..., Outputs]:
    try:
        return form.load(path)
    except Exception as error:  # each runtime has its own
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): export it again") from None
