"""Synthesizes a text with three trained models, and writes a WAV file.

  text=...                     what to say, required
  llm=... flow=... hifigan=... the three runs
  exports=a,b,c                instead of runs, the folders that they were exported to
  out=out.wav                  file to write; in a sweep, its name tells the jobs apart
  speaker=...                  speaker of the training data; default: the first
  backend=torch|onnx|jit|pt2   PyTorch, or files that were exported in this format
  precision=fp32|fp16|int8     precision of the exported files
  weights=best|last|average    which weights of each run (torch)
  metric=loss metric_mode=min|max
                               validation metric that defines the best
  trusted_exports=true         run exported files that an export of yours did not write
  device=auto|cpu|cuda|cuda:1|mps
                               where the models run; auto: a GPU if there is one
  seed=0                       another seed gives another rendition

Examples
  python -m cosyexp.synthesize text="hello, you." llm=runs/demo/llm flow=... hifigan=...
  python -m cosyexp.synthesize text="where is the lamp?" speaker=dora backend=onnx exports=voice
  python -m cosyexp.synthesize -m seed=0,1,2 text=hello llm=... flow=... hifigan=...
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import SynthesizeConfig

if TYPE_CHECKING:
    from cosyexp.synthesis.backends import LoadedModel

MODELS = ("llm", "flow", "hifigan")


@hydra_app(
    "synthesize",
    SynthesizeConfig,
    free=("text", "out", "llm", "flow", "hifigan"),
    lists=("exports",),
)
def main(config: SynthesizeConfig) -> str:
    """Writes the WAV file, and returns its path."""
    import io
    from pathlib import Path

    import soundfile

    from cosyexp.run.files import replace_file
    from cosyexp.run.logs import console
    from cosyexp.synthesis.pipeline import Pipeline

    with console():
        pipeline = Pipeline(load_models(config))
        wave = pipeline.synthesize(config.text, config.speaker, config.seed)
    content = io.BytesIO()
    soundfile.write(content, wave, pipeline.sample_rate, format="WAV", subtype="PCM_16")
    with replace_file(Path(config.out)) as file:
        file.write(content.getvalue())
    print(f"{config.out}: {len(wave) / pipeline.sample_rate:.2f} s")
    return config.out


def load_models(config: SynthesizeConfig) -> "dict[str, LoadedModel]":
    """Loads the three models by name, from their runs or from exported files.

    Raises:
        UserError: a model is missing, or the settings contradict each other.
    """
    from pathlib import Path

    from cosyexp.errors import UserError
    from cosyexp.run.checkpoint import Criterion
    from cosyexp.run.directory import RunDirectory
    from cosyexp.run.weights import criteria
    from cosyexp.synthesis.backends import from_exports, from_run, from_run_exports

    backend, precision = config.backend, config.precision.value
    options = backend, precision, config.device, config.trusted_exports
    given = {name: getattr(config, name) for name in MODELS}
    runs = {name: RunDirectory(path) for name, path in given.items() if path is not None}
    if config.exports and (runs or backend == "torch"):
        raise UserError(
            "exports= excludes runs and backend=torch: leave out llm=, flow= and hifigan=, and "
            "give the format of the exports as backend=, such as onnx"
        )
    if not config.exports and (missing := [name for name in MODELS if name not in runs]):
        raise UserError(
            f"{', '.join(missing)} must be given, for example {missing[0]}=..., or "
            f"exports=<folders> with backend=onnx"
        )
    if backend == "torch":
        best = criteria(runs, Criterion(config.metric, config.metric_mode.value))
        return {
            name: from_run(run, config.weights, config.device, best[name])
            for name, run in runs.items()
        }
    if config.exports:
        return from_exports(map(Path, config.exports), *options)
    return {name: from_run_exports(run, *options) for name, run in runs.items()}


if __name__ == "__main__":
    main()
