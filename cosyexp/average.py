"""Averages checkpoints of a run into <run_dir>/averages/<select><num>.

  run_dir=...            the run, required
  select=best|last       the best by a validation metric, or the newest
  num=5                  how many
  metric=loss            by what; lower is better
  output=...safetensors  write there instead
  strict=false           go on where there are fewer than num

Examples
  python -m cosyexp.average run_dir=runs/demo/flow
  python -m cosyexp.average run_dir=runs/demo/llm select=last num=3
  python -m cosyexp.average -m run_dir=runs/demo/llm,runs/demo/flow select=best,last num=3,5
"""

from typing import TYPE_CHECKING

from cosyexp.face import door

if TYPE_CHECKING:
    from omegaconf import DictConfig


@door("average")
def main(cfg: "DictConfig") -> str:
    from cosyexp.averaging.select import select
    from cosyexp.averaging.write import write_average
    from cosyexp.run.directory import RunDirectory
    from cosyexp.run.logs import console

    run, how = RunDirectory(cfg.run_dir), cfg.select.value
    model = run.config()["model"]["name"]
    with console():
        checkpoints = select(run, how, cfg.num, cfg.metric, cfg.strict)
        print(f"{'step':>9}  {'epoch':>5}  {cfg.metric:>10}  weight")
        for checkpoint in checkpoints:
            value = checkpoint.losses.get(cfg.metric)
            score = "-" if value is None else f"{value:.4f}"
            print(f"{checkpoint.step:>9}  {checkpoint.meta['epoch']:>5}  {score:>10}  {1 / len(checkpoints):.3f}")
        name = f"{how}{cfg.num}" + ("" if cfg.metric == "loss" else f"-{cfg.metric}")
        path = write_average(run, name, model, checkpoints, cfg.output)
    print(path)
    return str(path)


if __name__ == "__main__":
    main()
