"""Averages checkpoints of a run into <run_dir>/averages/<name>: one tensor at a time, and safe to repeat.

  run_dir=...            the run, or a model directory of the original (epoch_*.pt with their YAMLs); required
  select=best|last|window|ema    the best by a validation metric, the newest, all those of window=, or the newest EMA weights
  num=5                  how many; 1 for ema, all for window
  metric=loss            by what; lower is better
  window=[1000,2000]     only checkpoints from one step to another
  method=uniform|weighted|greedy|running
                         their mean; weights of softmax(-metric / temperature); only those that lower the validation loss of the mean,
                         which is measured; or the mean of all steps between the oldest and the newest of them
  temperature=0.1        of weighted
  output=...             write there instead, as .safetensors, or as .pt for the original's runtime
  strict=false           go on where there are fewer than num

Examples
  python -m cosyexp.average run_dir=runs/demo/flow
  python -m cosyexp.average run_dir=runs/demo/llm select=last num=3 method=weighted output=llm.pt
  python -m cosyexp.average -m run_dir=runs/demo/llm,runs/demo/flow select=best,last num=3,5
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app

if TYPE_CHECKING:
    from collections.abc import Mapping

    from omegaconf import DictConfig


@hydra_app("average", lists=("window",))
def main(cfg: "DictConfig") -> str:
    from pathlib import Path

    from cosyexp.averaging.candidates import candidates_in
    from cosyexp.averaging.methods import mix
    from cosyexp.averaging.select import Choice, select
    from cosyexp.averaging.write import folder_name, output_file, write_file, write_folder
    from cosyexp.run.logs import console

    folder, how, method = Path(cfg.run_dir), cfg.select.value, cfg.method.value
    output = None if cfg.output is None else output_file(cfg.output)
    choice = Choice(
        how, cfg.num, cfg.metric, None if cfg.window is None else tuple(cfg.window), cfg.strict
    )

    def evaluate(weights: Path) -> "Mapping[str, float]":
        from cosyexp.training.evaluate import (
            evaluator,
        )  # averaging itself knows neither data nor networks

        return evaluator(folder)(weights)

    with console():
        candidates = candidates_in(folder, ema=how == "ema", sums=method == "running")
        chosen = select(candidates, choice)
        average = mix(chosen, method, cfg.metric, cfg.temperature, evaluate)
        print(f"{'step':>9}  {'epoch':>5}  {cfg.metric:>10}  weight")
        for source, weight in average.rows():
            score = f"{source.losses[cfg.metric]:.4f}" if cfg.metric in source.losses else "-"
            print(f"{source.step:>9}  {source.epoch:>5}  {score:>10}  {weight:.3f}")
        if output is None:
            about = {"select": how, "metric": cfg.metric, "method": method}
            about |= {"temperature": cfg.temperature} if method == "weighted" else {}
            path = write_folder(
                average, candidates, folder_name(choice, method, cfg.temperature), about
            )
        else:
            path = write_file(average, output)
    print(path)
    return str(path)


if __name__ == "__main__":
    main()
