"""Averages checkpoints of a run, and writes the weights to <run_dir>/averages/<name>.

  run_dir=...            the run, or a model directory of the original (epoch_*.pt with YAMLs)
  select=best|last|window|ema
                         the best by a validation metric, the newest, all of window=, or the newest
                         exponential moving average
  num=5                  how many; default 1 for ema, all for window
  metric=loss            validation loss or metric that defines the best
  metric_mode=min|max    whether its lowest or its highest value is best
  window=[1000,2000]     only checkpoints of these steps, both included
  method=uniform|weighted|greedy|running
                         the mean; weights of softmax(-metric / method.temperature); a greedy soup
                         that keeps what improves the validation; or the mean of all steps between
                         two checkpoints
  output=...             a file instead: .safetensors, or .pt for the runtime of the original
  strict=false           average fewer checkpoints if there are not num

Examples
  python -m cosyexp.average run_dir=runs/demo/flow
  python -m cosyexp.average run_dir=runs/demo/llm select=last num=3 method=weighted output=llm.pt
  python -m cosyexp.average -m run_dir=runs/demo/llm,runs/demo/flow select=best,last num=3,5
"""

from typing import TYPE_CHECKING

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import AverageConfig

if TYPE_CHECKING:
    from collections.abc import Mapping


@hydra_app("average", AverageConfig, lists=("window",))
def main(config: AverageConfig) -> str:
    """Averages, prints a table of the checkpoints, and returns the path of the weights."""
    from pathlib import Path

    from cosyexp.averaging.candidates import candidates_in
    from cosyexp.averaging.methods import Method
    from cosyexp.averaging.select import Selection, select
    from cosyexp.averaging.write import folder_name, output_file, write_file, write_folder
    from cosyexp.registry import build
    from cosyexp.run.checkpoint import Criterion
    from cosyexp.run.logs import console

    folder, rule = Path(config.run_dir), config.select.value
    output = None if config.output is None else output_file(config.output)
    method: Method = build(config.method, "method")
    criterion = Criterion(config.metric, config.metric_mode.value)
    selection = Selection(rule, config.num, criterion, config.window, config.strict)

    def evaluate(weights: Path) -> "Mapping[str, float]":
        # Imported here, as cosyexp.averaging depends on neither data nor networks.
        from cosyexp.training.evaluate import evaluator

        return evaluator(folder)(weights)

    with console():
        source = candidates_in(folder, ema=rule == "ema", sums=method.running_sums)
        average = method(select(source, selection), criterion, evaluate)
        print(f"{'step':>9}  {'epoch':>5}  {config.metric:>10}  weight")
        for candidate, weight in average.rows():
            loss = candidate.losses.get(config.metric)
            score = "-" if loss is None else f"{loss:.4f}"
            print(f"{candidate.step:>9}  {candidate.epoch:>5}  {score:>10}  {weight:.3f}")
        if output is None:
            about = {
                "select": rule,
                "metric": config.metric,
                "metric_mode": config.metric_mode.value,
                "method": config.method,
            }
            path = write_folder(average, source, folder_name(selection, method), about)
        else:
            path = write_file(average, output)
    print(path)
    return str(path)


if __name__ == "__main__":
    main()
