"""What runs the components of a run: PyTorch from its weights, or the files that were exported from it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.exporting.components import load_components
from cosyexp.exporting.export import Format
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.verify import eager
from cosyexp.run.directory import RunDirectory
from cosyexp.run.weights import find_weights

Runner = Callable[..., tuple[Tensor, ...]]
FORMATS = {"onnx": Onnx, "jit": Jit}


def load_runners(run: RunDirectory, backend: str, weights: str) -> Mapping[str, Runner]:
    """A function of tensors for each component of a run. `weights` is read by the torch backend alone."""
    if backend == "torch":
        components = load_components(run, find_weights(run, weights))
        return {name: partial(eager, component) for name, component in components.items()}
    form = FORMATS[backend]()
    names = run.config()["components"]
    paths = {name: run.exports / form.name / f"{name}.fp32.{form.suffix}" for name in names}
    for path in paths.values():
        if not path.exists():
            raise UserError(f"{run} has no {path.name}: python -m cosyexp.export run_dir={run} format={backend}")
    return {name: _load(form, path) for name, path in paths.items()}


def _load(form: Format, path: Path) -> Runner:
    try:
        return form.load(path)
    except Exception as error:  # each runtime has its own
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): export it again") from None
