"""Generates preference pairs for mode=dpo: answers of a trained llm, and the ground truth.

  run_dir=...                    run of an llm, required
  data=demo|prepared|parquet     data set of the texts
  out=...                        folder to write; default data/<family>_pairs
  candidates=1                   answers generated per text
  score=none|edit|wer            none: the ground truth is chosen, an answer rejected
                                 edit, wer: the best answer is chosen, the worst rejected, by the
                                 edit distance of the speech tokens to the ground truth, or by the
                                 word error rate of a speech recognizer
  flow=... hifigan=...           wer: runs that synthesize the answers
  asr=... language=...           wer: folder of a Whisper model (CTranslate2), and the language
  weights=best|last|average|...  which weights of the run, or a file
  limit=...                      maximum number of training and of validation utterances
  batch_size=16                  answers that are generated at once
  device=auto|cpu|cuda|cuda:1|mps  where the models run; auto: a GPU if there is one
  seed=0                         of all random draws

The same command resumes where it stopped. Train with data=prepared data.dir=<out>.

Examples
  python -m cosyexp.prefer run_dir=runs/demo/llm
  python -m cosyexp.prefer run_dir=runs/demo/llm candidates=8 score=edit
  python -m cosyexp.prefer run_dir=runs/demo/llm candidates=4 score=wer flow=... hifigan=... limit=9
"""

from typing import Any

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import PreferConfig


def take_family(cfg: Any) -> None:
    """Fills in the family of the run, for which the data are prepared."""
    from omegaconf import OmegaConf

    from cosyexp.config import FamilyConfig, literal, to_dict
    from cosyexp.run.directory import RunDirectory

    if not OmegaConf.is_missing(cfg, "run_dir"):
        family = to_dict(RunDirectory(cfg.run_dir).config().family)
        cfg.family = OmegaConf.merge(OmegaConf.structured(FamilyConfig), literal(family))


@hydra_app("prefer", PreferConfig, complete=take_family)
def main(config: PreferConfig) -> str:
    """Writes the pairs, and returns the path of the folder."""
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
