"""Exports the components of a trained model into <run_dir>/exports/<format>, and proves each against PyTorch.

  format=onnx|jit|pt2    its components, for ONNX Runtime, for libtorch, or as programs of torch.export (format.compile=true: compiled)
  format=official        its weights, for the original's own runtime: llm.pt, flow.pt or hift.pt
  run_dir=...            the run; default the newest one under runs/
  weights=best|last|average|<a name under averages/>|<path>
  precision=fp32,fp16    several at once; int8 too for onnx
  components=a,b         only these; default all
  latency=false          does not measure it
  out=...                write there instead
  family=... weights=flow.pt out=...   without a run: an official file; model= if its name does not tell, settings=a=1,b=2 for train's words

Examples
  python -m cosyexp.export
  python -m cosyexp.export family=cosyvoice2 weights=pretrained/flow.pt precision=fp32,fp16 out=voice
  python -m cosyexp.export -m run_dir=runs/demo/llm,runs/demo/flow format=onnx,jit
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cosyexp.exporting.source import ExportSource


@hydra_app("export/config", lists=("components", "precision", "settings"))
def main(cfg: "DictConfig") -> str:
    from pathlib import Path

    from cosyexp.run.logs import console
    from cosyexp.run.targets import build

    form, names = build(cfg.format), None if "all" in cfg.components else list(cfg.components)
    with console():
        source = source_of(cfg)
        out = Path(cfg.out or f"{source.name}/exports/{form.name}{cfg.tag}")
        print(f"exporting {source.weights}")
        for precision in cfg.precision:
            form.export(source, out, precision=precision.value, names=names, timed=cfg.latency)
    return str(out)


def source_of(cfg: "DictConfig") -> "ExportSource":
    """The run and its weights, or an official file."""
    from cosyexp.errors import UserError
    from cosyexp.exporting.source import source_from_file, source_from_run
    from cosyexp.run.directory import RunDirectory, newest_run

    if cfg.family is None:
        run = newest_run() if cfg.run_dir is None else RunDirectory(cfg.run_dir)
        if cfg.run_dir is None:
            print(f"no run_dir was given: the newest run, {run}")
        return source_from_run(run, cfg.weights)
    if cfg.run_dir is not None:
        raise UserError(
            f"run_dir={cfg.run_dir} has a family of its own: leave family={cfg.family} out, or run_dir="
        )
    if cfg.out is None:
        raise UserError("family= exports a file without a run: say by out=<folder> where to")
    return source_from_file(config_of(cfg), cfg.weights)


def config_of(cfg: "DictConfig") -> dict[str, object]:
    """What a training of the model would have been given."""
    from pathlib import Path

    from cosyexp.cli.compose import composed
    from cosyexp.cli.hydra_app import CONFIGS
    from cosyexp.errors import UserError

    models = (
        [cfg.model]
        if cfg.model
        else sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    )
    for model in models:
        config = composed("train", [f"family={cfg.family}", f"model={model}"])
        if cfg.model or Path(cfg.weights).stem in (model, config["model"]["official"]):
            return (
                composed("train", [f"family={cfg.family}", f"model={model}", *cfg.settings])
                if cfg.settings
                else config
            )
    raise UserError(
        f"weights={cfg.weights} does not tell its model by its name: give model={'|'.join(models)}"
    )


if __name__ == "__main__":
    main()
