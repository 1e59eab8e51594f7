"""Speaks a text with three trained models, and writes a WAV file.

  text=...                     what to say, required
  llm= flow= hifigan=          the three runs, required
  out=out.wav                  the file to write; in a sweep, named by what varies
  speaker=...                  a speaker of the training data; default the first
  backend=torch|onnx|jit       the trained weights, or what was exported from them
  weights=best|last|average    which weights of each run (torch)
  seed=0                       another seed, another reading

Examples
  python -m cosyexp.synthesize text="hello, the book is red." llm=runs/demo/llm flow=runs/demo/flow hifigan=runs/demo/hifigan
  python -m cosyexp.synthesize text="where is the lamp?" speaker=dora backend=onnx out=lamp.wav llm=... flow=... hifigan=...
  python -m cosyexp.synthesize -m seed=0,1,2 text=hello llm=... flow=... hifigan=...
"""

from typing import TYPE_CHECKING

from cosyexp.face import door

if TYPE_CHECKING:
    from omegaconf import DictConfig


@door("synthesize", free=("text", "out", "llm", "flow", "hifigan"))
def main(cfg: "DictConfig") -> str:
    import io
    from pathlib import Path

    import soundfile

    from cosyexp.run.directory import RunDirectory
    from cosyexp.run.files import replace_file
    from cosyexp.run.logs import console
    from cosyexp.synthesis.pipeline import Pipeline

    runs = {name: RunDirectory(cfg[name]) for name in ("llm", "flow", "hifigan")}
    with console():
        pipeline = Pipeline(**runs, backend=cfg.backend.value, weights=cfg.weights)
        wave = pipeline.speak(cfg.text, cfg.speaker, cfg.seed)
    content = io.BytesIO()
    soundfile.write(content, wave, pipeline.sample_rate, format="WAV", subtype="PCM_16")
    with replace_file(Path(cfg.out)) as file:
        file.write(content.getvalue())
    print(f"{cfg.out}: {len(wave) / pipeline.sample_rate:.2f} s")
    return str(cfg.out)


if __name__ == "__main__":
    main()
