"""Measures trained models on a list of utterances, each alone and together.

  llm=... flow=... hifigan=...   the runs: one, two or all three
  valid=...                      data list or parquet file; default: the validation data of the run
  limit=...                      maximum number of utterances, spread over the list
  judge=[wer,similarity,mos]     what rates the speech; [] for none
  exports=a,b,c backend=...      instead of runs, the folders that they were exported to
  backend=torch|onnx|jit|pt2     PyTorch, or files that were exported in this format
  precision=fp32|fp16|int8       precision of the exported files
  official=cosyvoice2 llm=llm.pt flow=flow.pt hifigan=hift.pt
                                 instead of runs, files of the official release of this family
  weights=best|last|average      which weights of each run (torch)
  metric=loss metric_mode=min|max
                                 validation metric that defines the best
  trusted_exports=true           run exported files that an export of yours did not write
  shown=30                       number of utterances on the page, the worst ones
  device=auto|cpu|cuda|cuda:1|mps
  out=evaluation                 folder to write
  seed=0                         of all random draws

Prints a table, and writes evaluation.json, utterances.csv, timing.json and evaluation.html.

Examples
  python -m cosyexp.evaluate llm=runs/demo/llm flow=runs/demo/flow hifigan=runs/demo/hifigan
  python -m cosyexp.evaluate hifigan=runs/demo/hifigan judge=[] limit=20 out=vocoder
  python -m cosyexp.evaluate -m hifigan=runs/demo/hifigan weights=best,last judge=[]
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import EvaluateConfig


@hydra_app("evaluate", EvaluateConfig, lists=("exports",))
def main(config: EvaluateConfig) -> str:
    """Prints the table, and returns the path of the page."""
    from pathlib import Path

    from cosyexp.cli.sweep import print_rows
    from cosyexp.evaluation.evaluate import evaluate
    from cosyexp.evaluation.report import table, write_report
    from cosyexp.run.logs import console

    with console():
        evaluation = evaluate(config)
        path = write_report(evaluation, Path(config.out))
    systems = evaluation.summaries()
    for system, factor in evaluation.real_time_factors().items():
        systems[system]["rtf"] = factor
    print_rows(table(systems))
    for name, why in evaluation.left_out.items():
        print(f"{name} was left out: {why}")
    print(path)
    return str(path)


if __name__ == "__main__":
    main()
