"""Compares runs side by side: prints a table, and draws their curves into one picture.

  run_dir=a,b,c          the runs
  metric=loss            validation loss or metric that defines the best
  metric_mode=min|max    whether its lowest or its highest value is best
  out=compare.png        the picture: the training loss, and each validation loss and metric

The table has, for each run, the overrides that not all runs have, its last step, the best value and
its step, the other losses and metrics of that validation, and utterances per second.

Examples
  python -m cosyexp.compare run_dir=runs/demo/llm,runs/mine/llm
  python -m cosyexp.compare run_dir=runs/demo/llm
  python -m cosyexp.compare run_dir=a,b metric=acc metric_mode=max out=accuracy.png
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import CompareConfig


@hydra_app("compare", CompareConfig, lists=("run_dir",))
def main(config: CompareConfig) -> str:
    """Prints the table, and returns the path of the picture.

    Raises:
        UserError: no run has the metric.
    """
    from pathlib import Path

    from cosyexp.cli.sweep import print_rows, varying_overrides
    from cosyexp.errors import UserError
    from cosyexp.evaluation.curves import plot, read_curves

    runs = [read_curves(folder) for folder in config.run_dir]
    key, mode = f"valid/{config.metric}", config.metric_mode.value
    others = dict.fromkeys(name for run in runs for name in run.curves if name.startswith("valid/"))
    if key not in others:
        found = ", ".join(name.removeprefix("valid/") for name in others) or "none"
        raise UserError(f"no run has the metric {config.metric}: there are {found}")
    del others[key]
    rows: list[list[object]] = [
        ["run", "overrides", "steps", f"best {key}", "at step", *others, "utterances/s"]
    ]
    differing = varying_overrides([run.overrides for run in runs])
    for run, words in zip(runs, differing, strict=True):
        step, value = run.best(key, mode) or (None, None)
        rest = [None if step is None else run.at(name, step) for name in others]
        rows.append([run.name, words, run.steps, value, step, *rest, run.speed()])
    print_rows(rows)
    path = Path(config.out)
    plot(runs, path)
    print(path)
    return str(path)


if __name__ == "__main__":
    main()
