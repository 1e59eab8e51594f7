"""Prepares recordings and their texts as a data set: parquet shards with speech tokens and speaker embeddings.

  corpus=demo|ljspeech           where the recordings come from
  family=demo                    whose token rate is used; families of one rate can share a data set
  out=...                        the folder to write; default data/<corpus>_<rate>hz

Examples
  python -m cosyexp.prepare
  python -m cosyexp.prepare corpus.minutes=60 out=data/hour
  python -m cosyexp.prepare corpus=ljspeech corpus.root=~/LJSpeech-1.1 processes=8
"""

from typing import TYPE_CHECKING, Any

from cosyexp.face import door

if TYPE_CHECKING:
    from omegaconf import DictConfig


@door("prepare")
def main(cfg: "DictConfig") -> None:
    from pathlib import Path

    from omegaconf import OmegaConf

    from cosyexp.data.preparation import prepare_corpus
    from cosyexp.run.logs import console

    config: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {key: config[key] for key in ("codes", "shard_size", "fit_on", "processes", "max_bad", "seed")}
    with console():
        meta = prepare_corpus(config["corpus"], config["family"], Path(config["out"]), **options)
    print(f"{config['out']}: {meta['utterances']} utterances, {meta['hours']} hours, {len(meta['speakers'])} speakers")


if __name__ == "__main__":
    main()
