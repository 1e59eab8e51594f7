"""Exports the components of a trained run into <run_dir>/exports/<format>, and proves each against PyTorch.

  format=onnx|jit        its components, for ONNX Runtime or for libtorch
  format=official        its weights, for the original's own runtime: llm.pt, flow.pt or hift.pt
  run_dir=...            the run; default the newest one under runs/
  weights=best|last|average|<a name under averages/>|<path>
  components=a,b         only these; default all
  out=...                write there instead

Examples
  python -m cosyexp.export
  python -m cosyexp.export run_dir=runs/demo/flow format=jit weights=average
  python -m cosyexp.export -m run_dir=runs/demo/llm,runs/demo/flow format=onnx,jit
"""

from typing import TYPE_CHECKING

from cosyexp.face import door

if TYPE_CHECKING:
    from omegaconf import DictConfig


@door("export/config", lists=("components", "precision"))
def main(cfg: "DictConfig") -> str:
    from pathlib import Path

    from cosyexp.run.directory import RunDirectory, newest_run
    from cosyexp.run.logs import console
    from cosyexp.run.targets import build
    from cosyexp.run.weights import find_weights

    run = newest_run() if cfg.run_dir is None else RunDirectory(cfg.run_dir)
    if cfg.run_dir is None:
        print(f"no run_dir was given: the newest run, {run}")
    form = build(cfg.format)
    out = Path(cfg.out) if cfg.out else run.exports / f"{form.name}{cfg.tag}"
    names = None if "all" in cfg.components else list(cfg.components)
    with console():
        source = find_weights(run, cfg.weights)
        print(f"exporting {source}")
        for precision in cfg.precision:
            form.export(run, source, precision.value, names, out)
    return str(out)


if __name__ == "__main__":
    main()
