"""The shipped callbacks, through the command."""

import json
import math

import pytest

from cosyexp.training.callbacks.early_stopping import EarlyStopping
from tests.support import checkpoints, metrics, sentence, train_words

EVERY = ["trainer.valid_every=1", "checkpoint.every=1", "checkpoint.keep_last=99"]


def test_early_stopping_ends_after_its_patience_in_a_resumed_run_too(data, warm, tmp_path):
    """A learning rate of 0: no validation after the first is better."""
    stop = ["callbacks=early_stopping", "callbacks.early_stopping.patience=4", "optimizer.lr=0"]
    words = train_words("llm", data, *EVERY, *stop, "run_dir=run")
    warm("train", *words, "trainer.steps=2", cwd=tmp_path)
    said = warm("train", *words, "trainer.steps=50", cwd=tmp_path).stdout
    assert "early stopping: loss has not improved" in said and "done at step 4" in said
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    before = metrics(tmp_path / "run")
    assert "done at step 4" in warm("train", *words, "trainer.steps=50", cwd=tmp_path).stdout
    assert metrics(tmp_path / "run") == before
    patient = [word.replace("patience=4", "patience=6") for word in words]
    assert "done at step 6" in warm("train", *patient, "trainer.steps=50", cwd=tmp_path).stdout


def test_early_stopping_goes_on_while_the_monitored_value_rises(data, warm, tmp_path):
    stop = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1"]
    words = train_words("llm", data, *EVERY, *stop, "optimizer.lr=1e-2", "trainer.steps=5")
    said = warm("train", *words, "model.warmup=0", "run_dir=run", cwd=tmp_path).stdout
    assert "early stopping" not in said and "done at step 5" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_end_together(ranks, data, warm, tmp_path):
    stop = ["callbacks=early_stopping", "callbacks.early_stopping.patience=2", "optimizer.lr=0"]
    words = train_words("flow", data, *EVERY, *stop, f"engine.nproc_per_node={ranks}")
    said = warm("train", *words, "trainer.steps=9", "run_dir=run", cwd=tmp_path).stdout
    assert "done at step 2" in said


def test_a_value_that_is_not_measured_is_named(data, warm, tmp_path):
    words = train_words("llm", data, "callbacks=early_stopping", "trainer.steps=1")
    monitor = "callbacks.early_stopping.monitor=wer"
    refused = warm("train", *words, monitor, "run_dir=run", cwd=tmp_path, check=False)
    sentence(refused, "callbacks.early_stopping monitors wer", "one of loss, ce, acc")
    assert not (tmp_path / "run/config.yaml").exists()  # long before the first validation


def test_the_best_checkpoint_by_another_metric_stays_and_is_found(data, warm, tmp_path):
    keep = ["checkpoint.keep_last=1", "checkpoint.keep_best=0", "callbacks=best_checkpoint"]
    rule = ["callbacks.best_checkpoint.monitor=top5", "metrics=top5", "optimizer.lr=3e-2"]
    every = ["trainer.valid_every=1", "checkpoint.every=1", "trainer.steps=8", "model.warmup=0"]
    words = train_words("llm", data, *every, *keep, *rule, "run_dir=run")
    warm("train", *words, cwd=tmp_path)
    scores = {
        line["step"]: line["valid/top5"]
        for line in metrics(tmp_path / "run")
        if "valid/top5" in line
    }
    best = max(scores, key=lambda step: (scores[step], -step))
    assert f"step_{best:08d}" in checkpoints(tmp_path / "run")
    assert len(checkpoints(tmp_path / "run")) <= 4
    best_one = ["select=best", "num=1", "metric=top5", "metric_mode=max", "strict=false"]
    average = ["run_dir=run", *best_one]
    said = warm("average", *average, cwd=tmp_path).stdout
    found = int(said.splitlines()[1].split()[0])
    assert scores[found] == scores[best]


def test_the_monitor_logs_the_norm_of_every_module(data, warm, tmp_path):
    words = train_words("llm", data, "callbacks=monitor", "trainer.steps=2", "run_dir=run")
    warm("train", *words, "trainer.max_grad_norm=null", cwd=tmp_path)
    monitored = next(line for line in metrics(tmp_path / "run") if "monitor/lr/llm.0" in line)
    trained = next(
        line for line in metrics(tmp_path / "run") if "train/lr" in line and line["step"] == 1
    )
    norms = [value for key, value in monitored.items() if key.startswith("monitor/grad_norm/llm.")]
    assert len(norms) > 5
    whole = sum(norm**2 for norm in norms) ** 0.5
    assert whole == pytest.approx(trained["train/grad_norm"], rel=1e-5)
    assert monitored["monitor/lr/llm.0"] == trained["train/lr"]


@pytest.mark.parametrize("engine", [["engine=fsdp"], ["engine=deepspeed", "engine.stage=0"]])
def test_the_monitor_logs_the_same_norms_under_other_engines(engine, data, warm, tmp_path):
    words = train_words("llm", data, "callbacks=monitor", "trainer.steps=1")
    found = []
    for i, more in enumerate(([], engine)):
        warm("train", *words, *more, f"run_dir={i}", cwd=tmp_path)
        lines = metrics(tmp_path / str(i))
        found.append(next(line for line in lines if "monitor/lr/llm.0" in line))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_monitor_says_where_it_cannot_look(data, warm, tmp_path):
    words = train_words("llm", data, "callbacks=monitor", "trainer.steps=1", "engine=deepspeed")
    refused = warm("train", *words, "run_dir=run", cwd=tmp_path, check=False)
    sentence(refused, "callbacks=monitor", "engine=ddp")


def test_the_profiler_writes_a_trace(data, warm, tmp_path):
    options = ["callbacks.profiler.wait=1", "callbacks.profiler.active=2", "trainer.steps=4"]
    words = train_words("flow", data, "callbacks=profiler", *options, "run_dir=run")
    warm("train", *words, cwd=tmp_path)
    trace = json.loads((tmp_path / "run/profile/step_3.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("aten::" in name for name in names)
    assert "Self CPU" in (tmp_path / "run/profile/step_3.txt").read_text()


def test_throughput_counts_units_and_the_wait_for_data(data, warm, tmp_path):
    words = train_words("flow", data, "callbacks=throughput", "trainer.steps=2", "run_dir=run")
    warm("train", *words, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    measured = [line for line in lines if "time/data_share" in line]
    assert len(measured) == 2
    for line in measured:
        assert line["time/frames_per_second"] > line["time/utterances_per_second"] > 0
        assert 0 <= line["time/data_share"] <= 1


def test_callbacks_and_metrics_change_nothing_that_is_learned(data, warm, tmp_path):
    words = train_words("llm", data, "trainer.steps=3")
    more = ["callbacks=[throughput,monitor,best_checkpoint,early_stopping]", "metrics=top5"]
    for name, added in (("plain", []), ("watched", more)):
        warm("train", *words, *added, f"run_dir={name}", cwd=tmp_path)
    weights = "checkpoints/step_00000003/llm.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (
        tmp_path / "watched" / weights
    ).read_bytes()


def test_early_stopping_begins_anew_when_it_monitors_another_value():
    before = EarlyStopping(monitor="acc", mode="max")
    before.best, before.waited = -0.7, 4
    same, other = EarlyStopping(monitor="acc", mode="max"), EarlyStopping(monitor="loss")
    for callback in (same, other):
        callback.load_state_dict(before.state_dict())
    assert (same.best, same.waited) == (-0.7, 4)
    assert (other.best, other.waited) == (math.inf, 0)


def test_a_value_that_is_not_finite_is_no_improvement():
    stop = EarlyStopping(mode="max", patience=3)
    for value, waited in ((math.inf, 1), (1.0, 0), (math.nan, 1), (math.inf, 2), (0.5, 3)):
        stop.on_validation_end(None, {"loss": value})  # type: ignore[arg-type]
        assert stop.waited == waited
    assert stop.should_stop and stop.best == -1.0
