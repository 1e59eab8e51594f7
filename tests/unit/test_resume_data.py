"""What a resume makes of the data: their content decides, not their paths."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
import yaml

from cosyexp.averaging.candidates import candidates_in
from cosyexp.averaging.methods import Weighted
from cosyexp.averaging.select import Selection, select
from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.data.dataset import Dataset
from cosyexp.data.fingerprint import _hash, fingerprint, keep_fingerprint
from cosyexp.data.shards import write_shard
from cosyexp.errors import UserError
from cosyexp.objectives.preference import Preference
from cosyexp.registry import build
from cosyexp.run.checkpoint import BY_LOSS, Checkpoint, KeepBest
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import write_text
from cosyexp.run.weights import find_weights
from cosyexp.training.build import Job, build_trainer, train
from cosyexp.training.reference import NOTE, _is_cached, cache_key
from cosyexp.training.trainer import Trainer
from tests.tones import train_words
from tests.unit.runs import add, make_run, steps


@pytest.fixture
def folder(lists: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of a small data set, without cached fields."""
    shutil.copytree(lists[50], tmp_path / "data", ignore=shutil.ignore_patterns("*.fields"))
    return tmp_path / "data"


def other_tokens(shard: Path) -> None:
    """Replaces the tokens of a shard by others, as many and of equal size in the file."""
    rows = pq.read_table(shard).to_pylist()
    for row in rows:
        row["speech_token"] = row["speech_token"][::-1]
    status = os.stat(shard)
    write_shard(shard, rows)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def job(folder: Path, *words: str) -> TrainConfig:
    """Returns the config of a training of two steps on a folder of tones."""
    run = f"run_dir={folder.parent}/run"
    short = ["trainer.steps=2", "trainer.valid_every=1", "engine.threads=1", "logger=jsonl"]
    return compose_train([*train_words("sft", "llm", "demo", folder), run, *short, *words])


@contextmanager
def resumed(folder: Path, *words: str) -> Iterator[Trainer]:
    """The trainer of the resumed run, before its next step."""
    with build_trainer(job(folder, *words)) as trainer:
        yield trainer


# fingerprints


def dataset(path: Path, limit: int | None = None) -> Dataset:
    """Returns a data set of a folder for the llm."""
    collator = build(job(path).model.collator, "collator")
    return Dataset([f"{path}/train.list"], collator, max_bad=0, processes=1, limit=limit)


def test_a_fingerprint_is_of_the_content_not_of_the_place(folder):
    before = dataset(folder).fingerprint
    shutil.copytree(folder, folder.parent / "copy")
    for path in (folder.parent / "copy").rglob("*"):
        os.utime(path, (1, 1))
    assert dataset(folder.parent / "copy").fingerprint == before
    other_tokens(folder / "train.parquet")
    assert dataset(folder).fingerprint != before


def test_a_fingerprint_is_of_the_rows_that_are_used(folder):
    found = {dataset(folder, limit).fingerprint for limit in (3, 4, 20, 21, None)}
    assert len(found) == 3  # there are 20


def test_a_shard_is_read_again_only_if_it_changed(folder, monkeypatch):
    shard, read = folder / "train.parquet", Mock(wraps=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", read)
    first = fingerprint(shard)
    (folder / "train.fields").mkdir()
    keep_fingerprint(shard)
    _hash.cache_clear()  # as in another process
    assert fingerprint(shard) == first and read.call_count == 1
    other_tokens(shard)
    assert fingerprint(shard) != first and read.call_count == 2


def test_changed_tokens_are_read_even_if_size_and_time_are_the_same(folder):
    before = dataset(folder)
    token = before.row(0)[1]["speech"][0, 0]
    other_tokens(folder / "train.parquet")
    assert dataset(folder).row(0)[1]["speech"][0, -1] == token


# resuming


def test_other_training_data_of_equal_lengths_are_refused(folder):
    train(Job(job(folder)))
    other_tokens(folder / "train.parquet")
    before = (folder.parent / "run/config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"the training data of .* have changed"), resumed(folder):
        pass
    assert (folder.parent / "run/config.yaml").read_bytes() == before


def test_data_that_were_moved_are_accepted(folder):
    train(Job(job(folder)))
    moved = folder.rename(folder.parent / "moved")
    with resumed(moved) as trainer:
        progress = trainer.progress
        assert progress.step == 2 and progress.validated == 2 and progress.best is not None


def test_on_other_validation_data_the_best_starts_anew(folder, capsys):
    words = ["callbacks=early_stopping"]
    train(Job(job(folder, *words)))
    first = RunDirectory(folder.parent / "run").checkpoints.all()
    other_tokens(folder / "valid.parquet")
    with resumed(folder, "trainer.steps=3", *words) as trainer:
        assert trainer.progress.best is None and not trainer.progress.losses
        stop = trainer.callbacks["early_stopping"]
        assert stop.state_dict()["best"] == float("inf")
        assert trainer.fit().best is not None
    assert "the validation data changed from 2 utterances" in capsys.readouterr().out
    tags = {c.step: c.validation for c in trainer.run.checkpoints.all()}
    assert tags[1] == first[1].validation != tags[2] == tags[3]  # step 2 is validated again


def test_without_validation_data_the_losses_are_kept(folder):
    train(Job(job(folder)))
    with resumed(folder, "data.valid=null") as trainer:
        assert trainer.progress.best is not None and trainer.validation is None
    with resumed(folder) as trainer:
        assert trainer.progress.best is not None


def test_a_callback_that_monitors_the_validation_needs_validation_data(folder):
    words = ["data.valid=null", "callbacks=early_stopping"]
    with pytest.raises(UserError, match=r"callbacks\.early_stopping .* data\.valid=null"):
        train(Job(job(folder, *words)))
    assert not (folder.parent / "run/config.yaml").exists()


# comparing


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that was validated on data A up to step 3, then on data B, where losses are higher."""
    run = make_run(tmp_path / "run")
    for step, loss, data in ((1, 0.2, "A"), (2, 0.1, "A"), (3, 0.3, "A"), (4, 8, "B"), (5, 9, "B")):
        tag(add(run, step, {"loss": loss}), data)
    add(run, 6)
    return RunDirectory(run.path)


def tag(checkpoint: Checkpoint, data: str) -> None:
    """Records which data a checkpoint was validated on."""
    meta = {**checkpoint.meta, "validation": data}
    (checkpoint.path / "meta.yaml").write_text(yaml.safe_dump(meta))


def test_the_best_is_among_those_of_the_newest_validation_data(run):
    assert [c.step for c in BY_LOSS.rank(run.checkpoints.all())] == [4, 5]
    assert find_weights(run, "best").parent.name == "step_00000004"
    folder = candidates_in(run.path)
    assert [c.step for c in select(folder, Selection("best", 3, strict=False))] == [4, 5]


def test_losses_on_different_data_make_no_weights(run):
    selected = select(candidates_in(run.path), Selection("window", window=[3, 4]))
    with pytest.raises(UserError, match="validated on different data"):
        Weighted()(selected, BY_LOSS, lambda _: {})
    selected = select(candidates_in(run.path), Selection("window", window=[4, 5]))
    assert Weighted()(selected, BY_LOSS, lambda _: {}).factors


def test_pruning_keeps_the_best_on_each_of_the_data(run):
    run.checkpoints.prune(0, [KeepBest(BY_LOSS, 1)])
    assert steps(run) == [2, 4, 5, 6]  # the two newest stay in any case


# the reference of a preference training

KEPT = ["optimizer.lr=1", "objective.beta=1", "objective.loss=ipo", "model.warmup=3", "engine=fsdp"]
OTHER = ["objective.normalize=sum", "seed=1", "trainer.precision=bf16", "network.llm.blocks=2"]


def key(*words: str, data: str = "A") -> str:
    """Returns the key of cached log-probabilities on data with a fingerprint."""
    config = compose_train([*train_words("dpo", "llm", "demo", Path("unused")), *words])
    return cache_key(Preference, config, [SimpleNamespace(fingerprint=data), None])  # type: ignore


def test_cached_log_probabilities_depend_on_what_changes_them_and_on_nothing_else():
    assert {key(word) for word in KEPT} == {key()}
    assert len({key(), key(data="B"), *map(key, OTHER)}) == 2 + len(OTHER)


def test_the_ranks_follow_rank_0_in_whether_the_reference_is_cached(tmp_path):
    """A rank that found another answer in the file would wait for the others for ever."""
    run = make_run(tmp_path / "run")
    write_text(run.reference / NOTE, yaml.safe_dump({"cached": "key", "sha256": "other"}))

    def cached(rank: int, source: Path, decision: list[bool]) -> bool:
        gather = lambda own: [own] if rank == 0 else decision  # noqa: E731
        engine: Any = SimpleNamespace(rank=rank, all_gather=gather)
        return _is_cached(run, str(source), "key", engine)

    weights = tmp_path / "other.pt"
    assert cached(0, weights, []), "weights that are gone are not needed"
    weights.write_bytes(b"others than those that the cache is of")
    assert not cached(0, weights, [])
    assert cached(1, weights, [True, False]) and not cached(1, weights, [False, True])
