"""Synthesizes texts with three trained models, and writes WAV files.

  text=...                     what to say; of any length
  texts=lines.txt              instead, a file with a text per line, of which the llm speaks
                               batch_size=8 at once
  llm=... flow=... hifigan=... the three runs
  exports=a,b,c                instead of runs, the folders that they were exported to
  out=out.wav                  file to write; with texts=, a folder of that name without .wav. In a
                               sweep, its name tells the jobs apart
  speaker=...                  speaker of the training data; default: the first
  prompt=voice.wav             instead, a recording of at most 30 seconds whose voice speaks
  prompt_text=...              what is said in it: the llm then continues the recording
  instruct=...                 how to say it (cosyvoice2, cosyvoice3)
  speed=1.0                    2.0 takes half the time
  stream=true                  write the file while it is made (cosyvoice2, cosyvoice3), and with
                               text=- while the text arrives on standard input
  speech_tokenizer=onnx speech_tokenizer.path=... speaker_encoder=onnx speaker_encoder.path=...
                               with prompt=, front ends that were not fitted on the training data
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
  python -m cosyexp.synthesize -m seed=0,1,2 text="hello, you." llm=runs/demo/llm flow=...
  python -m cosyexp.synthesize text="where is the lamp?" speaker=dora backend=onnx exports=voice
  python -m cosyexp.synthesize text=hello prompt=me.wav prompt_text="the sky is blue." llm=...
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import MODELS, SynthesizeConfig

if TYPE_CHECKING:
    from cosyexp.synthesis.backends import LoadedModel
    from cosyexp.synthesis.pipeline import Pipeline, Voice


@hydra_app(
    "synthesize",
    SynthesizeConfig,
    free=("text", "texts", "out", "llm", "flow", "hifigan", "prompt", "prompt_text", "instruct"),
    lists=("exports",),
)
def main(config: SynthesizeConfig) -> str:
    """Writes the WAV files, and returns the path of the file or the folder."""
    from cosyexp.run.logs import console
    from cosyexp.synthesis.pipeline import Pipeline

    with console():
        pipeline = Pipeline(load_models(config))
        voice = find_voice(config, pipeline)
        if config.stream:
            return write_stream(config, pipeline, voice)
        return write_texts(config, pipeline, voice)


def find_voice(config: SynthesizeConfig, pipeline: "Pipeline") -> "Voice":
    """Returns the speaker of the training data, or the voice of the prompt.

    Raises:
        UserError: there is no such speaker, or the prompt cannot be used.
    """
    if config.prompt is None:
        return pipeline.voice(config.speaker)
    from cosyexp.synthesis.prompt import read_prompt

    front_ends = {
        "speech_tokenizer": config.speech_tokenizer,
        "speaker_encoder": config.speaker_encoder,
    }
    return read_prompt(config.prompt, config.prompt_text, pipeline.models, front_ends)


def write_texts(config: SynthesizeConfig, pipeline: "Pipeline", voice: "Voice") -> str:
    """Writes a file for `text`, or for each line of `texts`, and prints how long it took.

    Raises:
        UserError: `texts` cannot be read.
    """
    import time
    from pathlib import Path

    from cosyexp.errors import UserError
    from cosyexp.run.documents import read_text
    from cosyexp.synthesis.waves import write_wav

    out, texts = Path(config.out), [config.text or ""]
    paths = [out]
    if config.texts is not None:
        try:
            lines = read_text(Path(config.texts)).splitlines()
        except OSError as error:
            raise UserError(f"texts={config.texts} cannot be read ({error.strerror})") from None
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise UserError(f"texts={config.texts} has no text: write one per line")
        out, digits = out.with_suffix(""), len(str(len(texts)))
        paths = [out / f"{i + 1:0{digits}d}.wav" for i in range(len(texts))]
    start, samples = time.perf_counter(), 0
    waves = pipeline.synthesize_all(
        texts,
        voice,
        config.seed,
        instruct=config.instruct,
        speed=config.speed,
        batch_size=config.batch_size,
    )
    for path, wave in zip(paths, waves, strict=True):
        write_wav(path, wave, pipeline.sample_rate)
        samples += len(wave)
    print(timing(out, samples, pipeline, time.perf_counter() - start))
    return str(out)


def write_stream(config: SynthesizeConfig, pipeline: "Pipeline", voice: "Voice") -> str:
    """Writes a file while it is made, and prints how long that took."""
    import sys
    import time
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from cosyexp.synthesis.streaming import Stream
    from cosyexp.synthesis.waves import write_growing_wav

    stream, text = Stream(pipeline, voice, config.seed, config.instruct), config.text or ""
    start = time.perf_counter()

    def reported() -> Iterator[np.ndarray]:
        waves = stream.while_arriving(sys.stdin) if text == "-" else stream(text)
        for i, wave in enumerate(waves):
            if i == 0:
                seconds = time.perf_counter() - start
                print(f"first {len(wave) / pipeline.sample_rate:.2f} s after {seconds:.2f} s")
            yield wave

    samples = write_growing_wav(Path(config.out), reported(), pipeline.sample_rate)
    print(timing(Path(config.out), samples, pipeline, time.perf_counter() - start))
    return config.out


def timing(out: object, samples: int, pipeline: "Pipeline", seconds: float) -> str:
    """Returns a line with the length of the speech and the real-time factors."""
    length = samples / pipeline.sample_rate
    each = ", ".join(f"{name} {pipeline.seconds[name] / length:.2f}" for name in MODELS)
    return (
        f"{out}: {length:.2f} s of speech in {seconds:.2f} s, real-time factor "
        f"{seconds / length:.2f} ({each})"
    )


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
    runs = {name: RunDirectory(path) for name, path in config.given.items()}
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
