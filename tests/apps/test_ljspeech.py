"""Recorded speech: LJSpeech's layout through prepare, and some steps of each model on it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml

from cosyexp.data.shards import COLUMNS, read_list
from tests.apps.warm import Warm
from tests.support import MODELS, folder_from, metrics


@pytest.fixture(scope="module")
def corpus() -> Path:
    return folder_from("COSYEXP_SPEECH", "ljspeech-120")


@pytest.fixture(scope="module")
def prepared(corpus: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    said = warm(
        "prepare",
        "corpus=ljspeech",
        f"corpus.root={corpus}",
        "shard_size=50",
        "processes=1",
        "out=lj",
        cwd=folder,
    ).stdout
    assert "lj: 120 utterances" in said and "1 speakers" in said
    return folder / "lj"


def test_shards_have_the_original_s_columns(prepared, corpus):
    shards = {split: read_list(str(prepared / f"{split}.list")) for split in ("train", "valid")}
    rows = {
        split: [row for shard in shards[split] for row in pq.read_table(shard).to_pylist()]
        for split in shards
    }
    assert all(
        pq.read_schema(shard).equals(COLUMNS) for split in shards.values() for shard in split
    )
    assert [len(shards["train"]), len(rows["train"]), len(rows["valid"])] == [3, 114, 6]
    texts = dict(
        line.split("|")[::2]
        for line in (corpus / "metadata.csv").read_text(encoding="utf-8").splitlines()
    )
    for row in rows["train"] + rows["valid"]:
        assert row["text"] == texts[row["utt"]] and row["spk"] == "ljspeech"
        assert (
            row["audio_data"]
            == (corpus / "wavs" / f"{row['utt']}.wav").read_bytes()
            == Path(row["wav"]).read_bytes()
        )
        assert (
            len(row["utt_embedding"]) == 192
            and row["spk_embedding"] == rows["train"][0]["spk_embedding"]
        )
        assert abs(len(row["speech_token"]) - 50 * soundfile.info(row["wav"]).duration) <= 2
        assert min(row["speech_token"]) >= 0 and max(row["speech_token"]) < 512
    assert len({token for row in rows["train"] for token in row["speech_token"]}) > 450
    mean = np.mean([row["utt_embedding"] for row in rows["train"] + rows["valid"]], axis=0)
    assert np.allclose(mean, rows["train"][0]["spk_embedding"], atol=1e-5)
    assert yaml.safe_load((prepared / "meta.yaml").read_text())["speakers"] == ["ljspeech"]


@pytest.mark.parametrize("model", MODELS)
def test_each_demo_model_learns_on_it(model, prepared, warm, tmp_path):
    words = [
        f"model={model}",
        "data=prepared",
        f"data.dir={prepared}",
        "run_dir=run",
        "engine.threads=1",
    ]
    more = ["trainer.steps=12", "trainer.valid_every=6", "trainer.previews=0", "model.warmup=10"]
    result = warm.module("cosyexp.train", *words, *more, cwd=tmp_path, seconds=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [line["valid/loss"] for line in metrics(tmp_path / "run") if "valid/loss" in line]
    assert losses[0] > losses[1] > losses[2]
