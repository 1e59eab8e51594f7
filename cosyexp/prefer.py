"""Makes preference pairs for mode=dpo: what a trained llm says of each text of a data set, beside what was truly said.

  run_dir=...                    the run of an llm, required
  data=demo|prepared|parquet     whose texts it speaks
  out=...                        the folder to write; default data/<family>_pairs
  candidates=1                   how often it speaks each text
  score=none|edit|wer            rejected is what the model said, chosen the ground truth; or the worst and the best candidate,
                                 by their edit distance to the ground truth, or by the word error rate of a recogniser
  flow=... hifigan=...           for wer: the runs that make candidates audible
  asr=... language=...           for wer: the folder of a Whisper model (CTranslate2); default that of the extra eval
  weights=best|last|average|...  which weights of the run, or a file
  limit=...                      only so many utterances of the training and of the validation data
  seed=0 batch_size=16           other candidates; how many are made side by side

The same command continues where it was stopped. Train on the result with data=prepared data.dir=<out>.

Examples
  python -m cosyexp.prefer run_dir=runs/demo/llm
  python -m cosyexp.prefer run_dir=runs/cosyvoice2/llm data=parquet data.train=a.list data.valid=b.list candidates=8 score=edit
  python -m cosyexp.prefer run_dir=runs/demo/llm candidates=4 score=wer flow=runs/demo/flow hifigan=runs/demo/hifigan limit=100
"""

from typing import TYPE_CHECKING, Any

from cosyexp.cli.hydra_app import hydra_app

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_app("prefer")
def main(cfg: "DictConfig") -> str:
    from dataclasses import fields
    from pathlib import Path

    from omegaconf import OmegaConf

    from cosyexp.preferences.write import PairOptions, write_pairs
    from cosyexp.run.directory import RunDirectory
    from cosyexp.run.logs import console

    run = RunDirectory(cfg.run_dir)
    family = run.config()["family"]
    cfg.family = {"name": family["name"], "token_rate": family["token_rate"]}
    config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    options = {field.name: config[field.name] for field in fields(PairOptions)}
    with console():
        meta = write_pairs(run, config["data"], Path(config["out"]), PairOptions(**options))
    reasons = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items())
    skipped = f"{sum(meta['skipped'].values())} skipped" + (f" ({reasons})" if reasons else "")
    distance = "" if meta["distance"] is None else f", mean edit distance {meta['distance']:.3f}"
    print(f"{config['out']}: {meta['pairs']} pairs, {skipped}{distance}")
    return str(config["out"])


if __name__ == "__main__":
    main()
