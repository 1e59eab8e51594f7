"""Speaks a text with three trained models, and writes a WAV file.

  text=...                     what to say, required
  llm= flow= hifigan=          the three runs
  exports=a,b,c                or, without runs, the folders that they were exported into
  out=out.wav                  the file to write; in a sweep, named by what varies
  speaker=...                  a speaker of the training data; default the first
  backend=torch|onnx|jit|pt2   the trained weights, or what was exported from them
  precision=fp32|fp16|int8     of what was exported
  weights=best|last|average    which weights of each run (torch)
  seed=0                       another seed, another reading

Examples
  python -m cosyexp.synthesize text="hello, the book is red." llm=runs/demo/llm flow=runs/demo/flow hifigan=runs/demo/hifigan
  python -m cosyexp.synthesize text="where is the lamp?" speaker=dora backend=onnx exports=voice out=lamp.wav
  python -m cosyexp.synthesize -m seed=0,1,2 text=hello llm=... flow=... hifigan=...
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cosyexp.synthesis.backends import LoadedModel

MODELS = ("llm", "flow", "hifigan")


@hydra_app("synthesize", free=("text", "out", "llm", "flow", "hifigan"), lists=("exports",))
def main(cfg: "DictConfig") -> str:
    import io
    from pathlib import Path

    import soundfile

    from cosyexp.run.files import replace_file
    from cosyexp.run.logs import console
    from cosyexp.synthesis.pipeline import Pipeline

    with console():
        pipeline = Pipeline(load_models(cfg))
        wave = pipeline.speak(cfg.text, cfg.speaker, cfg.seed)
    content = io.BytesIO()
    soundfile.write(content, wave, pipeline.sample_rate, format="WAV", subtype="PCM_16")
    with replace_file(Path(cfg.out)) as file:
        file.write(content.getvalue())
    print(f"{cfg.out}: {len(wave) / pipeline.sample_rate:.2f} s")
    return str(cfg.out)


def load_models(cfg: "DictConfig") -> "dict[str, LoadedModel]":
    """The three models: from their runs, or from what was exported."""
    from pathlib import Path

    from cosyexp.errors import UserError
    from cosyexp.run.directory import RunDirectory
    from cosyexp.synthesis.backends import from_exports, from_run, from_run_exports

    backend, precision = cfg.backend.value, cfg.precision.value
    runs = {name: RunDirectory(cfg[name]) for name in MODELS if cfg[name] is not None}
    if cfg.exports and (runs or backend == "torch"):
        raise UserError(
            "exports= needs neither runs nor backend=torch: leave llm=, flow= and hifigan= out, and give backend=onnx|jit|pt2"
        )
    if not cfg.exports and (missing := [name for name in MODELS if name not in runs]):
        raise UserError(
            f"{', '.join(missing)} must be given, for example {missing[0]}=..., or exports=<folders> with backend=onnx"
        )
    if backend == "torch":
        return {name: from_run(run, cfg.weights) for name, run in runs.items()}
    if cfg.exports:
        return from_exports(map(Path, cfg.exports), backend, precision)
    return {name: from_run_exports(run, backend, precision) for name, run in runs.items()}


if __name__ == "__main__":
    main()
