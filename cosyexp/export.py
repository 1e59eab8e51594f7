"""Exports the components of a model to <run_dir>/exports/<format>, and verifies them.

  format=onnx|jit|pt2    components for ONNX Runtime, for libtorch, or as torch.export programs
                         (format.compile=true: compiled for this machine)
  format=official        weights for the runtime of the original: llm.pt, flow.pt or hift.pt
  format=hf              an llm of cosyvoice2 or cosyvoice3 as a Hugging Face folder, for
                         transformers, vLLM, SGLang and TensorRT-LLM
  format=peft            the adapter of a run with adapter=lora, alone; all others merge it
  run_dir=...            the run; default: the newest one under runs/
  weights=best|last|average|<a name under averages/>|<path>
  metric=loss metric_mode=min|max
                         validation metric that defines the best, and whether it is its lowest or
                         its highest value
  precision=fp32,fp16    one or several; int8 too for onnx
  components=a,b         only these; default: all
  latency=false          do not measure the latency
  device=auto|cpu|cuda|cuda:1|mps
                         where the files are compared with PyTorch and timed
  out=...                another folder
  license=...            of the weights, such as apache-2.0, for the model card
  evaluation=evaluation  folder of cosyexp.evaluate: its table is a part of the card if these
                         weights were evaluated
  official=cosyvoice2 weights=flow.pt out=...
                         instead of a run, a file of the official release of this family. Its name
                         tells the model; otherwise give settings=model=flow. settings= takes
                         overrides of train

Each file is compared with PyTorch on random inputs of many sizes. MODEL.md, the model card, has the
data, the training, the validation and the evaluation of the weights.

Examples
  python -m cosyexp.export
  python -m cosyexp.export official=cosyvoice2 weights=pretrained/flow.pt precision=fp16 out=voice
  python -m cosyexp.export -m run_dir=runs/demo/llm,runs/demo/flow format=onnx,jit
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import ExportConfig

if TYPE_CHECKING:
    from cosyexp.config import TrainConfig
    from cosyexp.exporting.export import Format
    from cosyexp.exporting.source import ExportSource


@hydra_app("export/config", ExportConfig, lists=("components", "precision", "settings"))
def main(config: ExportConfig) -> str:
    """Exports the model in each precision, and returns the path of the folder."""
    from pathlib import Path

    from cosyexp.exporting.card import write_card
    from cosyexp.registry import build
    from cosyexp.run.files import below
    from cosyexp.run.logs import console

    form: Format = build(config.format, "format")
    names = None if "all" in config.components else config.components
    with console():
        source = find_source(config)
        name = f"{form.name}{config.tag}"
        out = Path(config.out) if config.out else below(source.name, "exports", name)
        print(f"exporting {source.weights}")
        for precision in config.precision:
            form.export(
                source,
                out,
                precision=precision.value,
                names=names,
                timed=config.latency,
                device=config.device,
                node=config.format,
            )
        write_card(source, out, config.license, Path(config.evaluation))
    return str(out)


def find_source(config: ExportConfig) -> "ExportSource":
    """Returns the model to export: of a run, or of an official file.

    Raises:
        UserError: there is none, or the settings contradict each other.
    """
    from cosyexp.errors import UserError
    from cosyexp.exporting.source import source_from_file, source_from_run
    from cosyexp.run.checkpoint import Criterion
    from cosyexp.run.directory import RunDirectory, newest_run

    if config.official is None:
        run = newest_run() if config.run_dir is None else RunDirectory(config.run_dir)
        if config.run_dir is None:
            print(f"no run_dir was given: the newest run, {run}")
        return source_from_run(
            run, config.weights, Criterion(config.metric, config.metric_mode.value)
        )
    if config.run_dir is not None:
        raise UserError(f"run_dir={config.run_dir} and official= exclude each other: give one")
    if config.out is None:
        raise UserError("official= exports a file without a run: give out=<folder>")
    return source_from_file(official_config(config), config.weights)


def official_config(config: ExportConfig) -> "TrainConfig":
    """Returns the config that a training of the model in an official file would have.

    Raises:
        UserError: the model is not known from the name of the file.
    """
    from pathlib import Path

    from cosyexp.cli.compose import compose_train
    from cosyexp.cli.hydra_app import CONFIG_DIR
    from cosyexp.errors import UserError

    family = f"family={config.official}"
    if any(word.startswith("model=") for word in config.settings):
        return compose_train([family, *config.settings])
    models = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml"))
    for model in models:
        words = [family, f"model={model}"]
        if Path(config.weights).stem in (model, compose_train(words).model.official):
            return compose_train([*words, *config.settings])
    raise UserError(
        f"weights={config.weights} is not the name of an official file: give "
        f"settings=model={'|'.join(models)}"
    )


if __name__ == "__main__":
    main()
