"""Prepares recordings and their texts as a data set: parquet shards with speech tokens and speaker embeddings.

  corpus=demo|ljspeech|libritts|kaldi|table        where the recordings come from; WAV, FLAC, MP3 or OGG, of 16 kHz and more
  speech_tokenizer=kmeans|onnx                     onnx: speech_tokenizer.path=speech_tokenizer_v2.onnx
  speaker_encoder=mel|onnx                         onnx: speaker_encoder.path=campplus.onnx
  family=demo                                      whose token rate is used; families of one rate can share a data set
  out=...                                          the folder to write; default data/<corpus>_<rate>hz. The same command resumes it
  cache=[mel,f0,wave]                              computes already now what flow (mel) and hifigan (all three) will read
  inspect=...                                      prepares nothing: says what a data list, a parquet file or a prepared folder holds

Examples
  python -m cosyexp.prepare corpus=ljspeech corpus.root=~/LJSpeech-1.1 processes=8
  python -m cosyexp.prepare corpus=table corpus.path=all.csv corpus.columns.audio=file corpus.columns.speaker=null out=data/mine
  python -m cosyexp.prepare inspect=data/mine/train.list
"""

from typing import TYPE_CHECKING, Any

from cosyexp.cli.hydra_app import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_app("prepare", lists=("cache",))
def main(cfg: "DictConfig") -> None:
    from pathlib import Path

    from omegaconf import OmegaConf

    from cosyexp.data.inspection import inspect
    from cosyexp.data.preparation import audio_fields, fill_cache, prepare_corpus
    from cosyexp.data.report import lines
    from cosyexp.run.logs import console
    from cosyexp.run.targets import build

    config: Any = OmegaConf.to_container(cfg, resolve=True)
    if config["inspect"]:
        for line in inspect(config["inspect"], build(config["family"]["tokenizer"])):
            print(line)
        return
    options = {
        key: config[key]
        for key in ("shard_size", "fit_on", "max_seconds", "processes", "max_bad", "seed")
    }
    options |= {key: build(config[key]) for key in ("speech_tokenizer", "speaker_encoder")}
    out, family = Path(config["out"]), config["family"]
    fields = audio_fields(family, config["cache"])
    with console():
        meta = prepare_corpus(config["corpus"], family, out, **options)
        fill_cache(out, fields, config["processes"])
    for line in lines(meta, out):
        print(line)


if __name__ == "__main__":
    main()
