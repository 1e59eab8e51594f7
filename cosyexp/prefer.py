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
    from pathlib import Path

    from cosyexp.data.prepared import META
    from cosyexp.preferences.write import write_pairs
    from cosyexp.run.documents import Fields
    from cosyexp.run.logs import console

    with console():
        meta = write_pairs(config)
    fields = Fields(meta, Path(config.out) / META)
    counts, pairs = fields.counts("skipped"), fields.whole("pairs")
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    skipped = f"{sum(counts.values())} skipped" + (f" ({reasons})" if reasons else "")
    distance = f", mean edit distance {fields.number('distance'):.3f}" if pairs else ""
    print(f"{config.out}: {pairs} pairs, {skipped}{distance}")
    return config.out


if __name__ == "__main__":
    main()
