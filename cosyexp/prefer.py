"""Makes preference pairs for mode=dpo: answers of a trained llm, next to the ground truth.

  run_dir=...                    the run of an llm, required
  data=demo|prepared|parquet     the texts
  out=...                        the folder to write; default data/<family>_pairs
  candidates=1                   answers generated per text
  score=none|edit|wer            none: chosen is the ground truth, rejected an answer; else the best
                                 and the worst answer, by edit distance of the speech tokens to the
                                 ground truth, or by the word error rate of a speech recognizer
  flow=... hifigan=...           for wer: the runs that make answers audible
  asr=... language=...           for wer: folder of a Whisper model (CTranslate2)
  weights=best|last|average|...  which weights of the run, or a file
  limit=...                      only so many utterances of the training and of the validation data
  seed=0 batch_size=16           other answers; how many are generated at once

A repeated command goes on where it was stopped. Train with data=prepared data.dir=<out>.

Examples
  python -m cosyexp.prefer run_dir=runs/demo/llm
  python -m cosyexp.prefer run_dir=runs/demo/llm candidates=8 score=edit
  python -m cosyexp.prefer run_dir=runs/demo/llm candidates=4 score=wer flow=... hifigan=... limit=9
"""

from typing import Any

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import PreferConfig


def take_family(cfg: Any) -> None:
    """Fills in the family of the run, which the data are prepared for."""
    from omegaconf import OmegaConf

    from cosyexp.config import FamilyConfig
    from cosyexp.run.directory import RunDirectory

    if not OmegaConf.is_missing(cfg, "run_dir"):
        family: FamilyConfig = RunDirectory(cfg.run_dir).config().family
        cfg.family = OmegaConf.structured(family)


@hydra_app("prefer", PreferConfig, complete=take_family)
def main(config: PreferConfig) -> str:
    """Writes the pairs, and returns the folder."""
    from cosyexp.preferences.write import write_pairs
    from cosyexp.run.logs import console

    with console():
        meta = write_pairs(config)
    reasons = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items())
    skipped = f"{sum(meta['skipped'].values())} skipped" + (f" ({reasons})" if reasons else "")
    mean = meta["distance"]
    distance = "" if mean is None else f", mean edit distance {mean:.3f}"
    print(f"{config.out}: {meta['pairs']} pairs, {skipped}{distance}")
    return config.out


if __name__ == "__main__":
    main()
