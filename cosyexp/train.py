"""Trains one of the three CosyVoice models; the same command resumes an interrupted run.

  family=demo|cosyvoice|cosyvoice2|cosyvoice3
                               family of models: sample rate, vocabularies, networks
  model=llm|flow|hifigan       the model to train
  mode=sft|dpo                 supervised training, or (llm) preference optimization
  engine=ddp|fsdp|deepspeed    every rank holds the whole model, or a shard of it
  engine.nproc_per_node=auto   ranks on this machine; auto: one per GPU
  data=demo|prepared|parquet   the demo corpus, a folder of cosyexp.prepare, or parquet files
  run_dir=...                  folder of the run; default runs/<family>/<model>
  init_from=...                weights to start from: another run, or a file, such as an official
                               llm.pt, flow.pt or hift.pt
  tokenizer.extra=[...]        new tokens of the text; init_extra=mean|normal|copy:<token> is what
                               their embeddings start from
  resume.change=[optimizer.lr] settings that a resumed run goes on with at another value
  reference=...                mode=dpo: weights of the reference model; default init_from
  adapter=none|lora            train all weights, or low-rank changes of those of init_from
  plan=true                    print parameters, memory per engine and time, and train nothing
  trainer.steps=1000 trainer.accumulate=2 trainer.precision=bf16 optimizer.lr=1e-4 ...

Examples
  python -m cosyexp.train model=flow
  python -m cosyexp.train family=cosyvoice2 experiment=finetune_flow init_from=flow.pt ...
  python -m cosyexp.train -m model=llm,flow optimizer.lr=1e-4,3e-4 hydra/launcher=slurm

-m                     sweep over all combinations of the values, one after the other, or in
                       parallel with hydra/launcher=local|slurm
--cfg job              print the composed config
--info defaults-tree   print where each value comes from
--hydra-help           print Hydra's own options
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import TrainConfig, engine_config


@hydra_app("train", TrainConfig)
def main(config: TrainConfig) -> float | None:
    """Trains, and returns the lowest validation loss, for a sweeper.

    Raises:
        SystemExit: the run was stopped by a signal, which also ends a sweep.
    """
    from hydra.core.hydra_config import HydraConfig

    from cosyexp.cli.sweep import report
    from cosyexp.training.build import Job, train
    from cosyexp.training.launch import launch
    from cosyexp.training.plan import plan
    from cosyexp.training.signals import requeue

    if config.plan:
        plan(config)
        return None
    overrides = list(HydraConfig.get().overrides.task)
    outcome = launch(train, Job(config, overrides), engine_config(config.engine))
    if outcome.preempted:
        requeue()
    if outcome.stopped:
        raise SystemExit(0)
    report(valid_loss=outcome.best, steps=outcome.step)
    return outcome.best


if __name__ == "__main__":
    main()
