"""Trains one of the three CosyVoice models. The same command continues the run where it stopped.

  family=demo|cosyvoice|cosyvoice2|cosyvoice3    which family of networks
  model=llm|flow|hifigan         which of its three models
  mode=sft|dpo                   what it learns from: recordings, or preferences between two answers
  engine=ddp|fsdp|deepspeed      where it runs: every rank holds all of the model, or a shard of it
  engine.nproc_per_node=auto     how many ranks; auto is one process a GPU
  data=demo|prepared|parquet     what it trains on

  run_dir=...                    where everything of the run lies; default runs/<family>/<model>
  init_from=...                  start from the weights of another run, or of a file: also an official llm.pt, flow.pt, hift.pt
  reference=...                  mode=dpo: what the model is compared with; default init_from
  trainer.steps=1000 trainer.accumulate=2 trainer.precision=bf16 optimizer.lr=1e-4 data.workers=4 ...

Examples
  python -m cosyexp.train model=flow
  python -m cosyexp.train family=cosyvoice2 model=flow experiment=finetune init_from=flow.pt data=parquet data.train=a.list ...
  python -m cosyexp.train -m model=llm,flow optimizer.lr=1e-4,3e-4 hydra/launcher=slurm

-m           a sweep over all values given, one after the other, or by hydra/launcher=local|slurm side by side
--cfg job    print the composed config        --info defaults-tree    where each value comes from
--hydra-help Hydra's own options
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import TrainConfig, engine_config


@hydra_app("train", TrainConfig)
def main(config: TrainConfig) -> float | None:
    """Trains, and returns the lowest validation loss to a sweeper."""
    from hydra.core.hydra_config import HydraConfig

    from cosyexp.cli.sweep import report
    from cosyexp.training.build import Job, train
    from cosyexp.training.launch import launch
    from cosyexp.training.signals import requeue

    overrides = list(HydraConfig.get().overrides.task)
    outcome = launch(train, Job(config, overrides), engine_config(config.engine))
    if outcome.preempted:
        requeue()
    if outcome.stopped:  # a sweep ends too
        raise SystemExit(0)
    report(valid_loss=outcome.best, steps=outcome.step)
    return outcome.best


if __name__ == "__main__":
    main()
