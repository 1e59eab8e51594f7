"""New tokens of a text tokenizer: their ids, their rows of the embedding, and the official file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cosyexp.cli.compose import compose_train
from cosyexp.cli.overrides import normalize_overrides
from cosyexp.config import TrainConfig
from cosyexp.data.fields import TextTokens, cache_name
from cosyexp.data.tokenizers import (
    CharacterTokenizer,
    QwenTokenizer,
    WhisperTokenizer,
    read_special_tokens,
)
from cosyexp.errors import UserError
from cosyexp.exporting.official import Official
from cosyexp.exporting.source import source_from_file, source_from_run
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.training.build import Job, train
from tests.support import FAMILIES
from tests.tones import train_words

NEW = ("<|laugh|>", "ʃ", "ʃʃ")
# the first new id of each
FIRST = {"characters": 6, "whisper": 51866, "qwen": 151924}


def tokenizer(kind: str, folder: Path, extra: Sequence[str] | None) -> Any:
    if kind == "characters":
        return CharacterTokenizer(alphabet=" heky", extra=extra)
    if kind == "whisper":
        return WhisperTokenizer(extra=extra)
    return QwenTokenizer(folder=str(folder), special_tokens="cosyvoice3", extra=extra)


@pytest.mark.parametrize("kind", FIRST)
def test_new_tokens_follow_the_vocabulary(kind, qwen_folder):
    plain, extended = (tokenizer(kind, qwen_folder, extra) for extra in (None, NEW))
    laugh, sh, long_sh = extended.new_ids()
    assert [laugh, sh, long_sh] == [FIRST[kind] + i for i in range(3)]
    before, after = plain.encode("hey "), plain.encode(" key")
    text = "hey ʃʃʃ<|laugh|> key"
    assert extended.encode(text) == [*before, long_sh, sh, laugh, *after]
    assert extended.encode("hey key") == plain.encode("hey key") and not extended.unknown(text)
    assert repr(plain) == repr(extended)  # older caches stay valid, and the new one has its own
    assert cache_name(TextTokens(plain)) != cache_name(TextTokens(extended))


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("extra", [["", "ʃ"], ["ʃ", "ʃ"]])
def test_new_tokens_are_different_texts(kind, extra, qwen_folder):
    with pytest.raises(ValueError, match="different texts, none of them empty"):
        tokenizer(kind, qwen_folder, extra)


@pytest.mark.parametrize(
    ("kind", "known"),
    [("characters", "k"), ("whisper", "<|en|>"), ("qwen", "[breath]"), ("qwen", "k")],
)
def test_a_known_token_is_not_new(kind, known, qwen_folder):
    with pytest.raises(UserError, match="is a token of the vocabulary already: leave it out"):
        tokenizer(kind, qwen_folder, ["ʃ", known]).new_ids()


def test_tokenizer_extra_is_short_for_the_key():
    (word,) = normalize_overrides(["tokenizer.extra=[ab]"], (), ())
    assert word == "family.tokenizer.extra=[ab]"


# rows of the embedding ----------------------------------------------------------------------------

EMBEDDINGS = {
    "demo": ["text_embedding.weight"],
    "cosyvoice2": ["llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight"],
}


@pytest.fixture
def start(lists: dict[int, Path], qwen_folder: Path, tmp_path: Path) -> Any:
    """Returns the config of a training of an llm with new tokens."""

    def words(family: str, *more: str) -> TrainConfig:
        folder = lists[50 if family == "demo" else 25]
        chosen = train_words("sft", "llm", family, folder)
        if family in FAMILIES:
            chosen.remove("tokenizer@family.tokenizer=characters")
            chosen.append(f"family.tokenizer.folder={qwen_folder}")
        else:
            chosen.append("family.text_vocabulary=36")
        extra = 'family.tokenizer.extra=["ab","ʃ"]'  # the first is in some of the texts
        return compose_train([*chosen, extra, f"run_dir={tmp_path}/run", "trainer.steps=0", *more])

    return words


@pytest.fixture
def source(start: Any, tmp_path: Path) -> Any:
    """Returns the weights of an llm without new tokens, and writes them to source.safetensors."""

    def write(family: str) -> dict[str, torch.Tensor]:
        node = dict(start(family).network)
        if family == "demo":
            node["text_vocabulary"] = 34
        torch.manual_seed(1)
        state = {name: t.clone() for name, t in build(node, "network").state_dict().items()}
        save_tensors(tmp_path / "source.safetensors", state)
        return state

    return write


def weights(run: Path, step: int = 0) -> dict[str, torch.Tensor]:
    return read_tensors(run / f"checkpoints/step_{step:08}/llm.safetensors")


@pytest.mark.parametrize(
    ("family", "how"),
    [("demo", "mean"), ("demo", "normal"), ("demo", "copy:b"), ("cosyvoice2", "copy:b")],
)
def test_new_rows_start_as_told_and_nothing_else_changes(family, how, start, source, tmp_path):
    before = source(family)
    config = start(family, f"init_from={tmp_path}/source.safetensors", f"init_extra='{how}'")
    train(Job(config))
    after = weights(tmp_path / "run")
    text = build(config.family.tokenizer, "tokenizer")
    ids = text.new_ids()
    for name in EMBEDDINGS[family]:
        old, new = before.pop(name), after.pop(name)
        kept = [i for i in range(len(old)) if i not in ids]
        assert torch.equal(new[kept], old[kept])
        earlier = old[: ids[0]]
        if how == "mean":
            assert torch.equal(new[ids], earlier.mean(0).expand(2, -1))
        elif how == "normal":
            scaled = (new[ids] - earlier.mean(0)) / earlier.std(0)
            assert 0.5 < scaled.std() < 1.5 and not torch.equal(new[ids[0]], new[ids[1]])
        else:
            assert torch.equal(new[ids], old[text.encode("b")].expand(2, -1))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_new_rows_are_learned_and_the_next_run_keeps_them(start, source, tmp_path):
    source("demo")
    words = ["trainer.steps=3", "trainer.valid_every=3"]
    train(Job(start("demo", f"init_from={tmp_path}/source.safetensors", *words)))
    (name,) = EMBEDDINGS["demo"]
    rows = [weights(tmp_path / "run", step)[name][34:] for step in (0, 3)]
    assert torch.equal(rows[0][0], rows[0][1])
    assert not torch.equal(rows[1][0], rows[0][0])  # "ab" was read
    more = ['family.tokenizer.extra=["ab","ʃ","ʒ"]', "family.text_vocabulary=37"]
    second = start("demo", f"init_from={tmp_path}/run", f"run_dir={tmp_path}/next", *more)
    train(Job(second))
    later = weights(tmp_path / "next")[name]
    assert torch.equal(later[34:36], rows[1])
    assert torch.equal(later[36], later[:36].mean(0))
    other = ['family.tokenizer.extra=["ʃ","ab"]']
    third = start("demo", f"init_from={tmp_path}/run", f"run_dir={tmp_path}/other", *other)
    with pytest.raises(UserError, match="has the new tokens ab, ʃ: name them first in"):
        train(Job(third))


def test_weights_that_have_the_rows_are_left_alone(start, tmp_path):
    config = start("demo", f"init_from={tmp_path}/own.safetensors", "init_extra=null")
    torch.manual_seed(1)
    own = build(config.network, "network").state_dict()
    save_tensors(tmp_path / "own.safetensors", own)
    train(Job(config))
    after = weights(tmp_path / "run")
    assert all(torch.equal(after[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["family.text_vocabulary=35"], "needs 36 rows of the text embedding, which has 35: add"),
        (["init_extra=copy:xyz"], "init_extra=copy:xyz must be mean, normal, or copy:"),
        (["init_extra='copy:ʃ'"], "and the text of one earlier token"),
        (["init_extra=zeros"], "init_extra=zeros must be mean, normal, or copy:"),
        (["mode=dpo"], "the reference model does not know the new token 'ab': train it with"),
        (
            ["adapter=lora"],
            "an adapter does not train the text embedding, which the new token 'ab'",
        ),
        (['family.tokenizer.extra=["a"]'], "'a' is a token of the vocabulary already"),
        (["family.tokenizer.extra=[1]"], r"extra=\[1\] must be a list in which each is text"),
    ],
    ids=str,
)
def test_what_is_refused(words, message, start, source, tmp_path):
    source("demo")
    with pytest.raises(UserError, match=message):
        train(Job(start("demo", f"init_from={tmp_path}/source.safetensors", *words)))


# the official file --------------------------------------------------------------------------------


def test_the_runtime_of_the_original_reads_new_tokens(start, source, qwen_folder, tmp_path):
    """Its tokenizer is CosyVoice-BlankEN with special tokens that are added in its code."""
    before = source("cosyvoice2")
    config = start("cosyvoice2", f"init_from={tmp_path}/source.safetensors")
    train(Job(config))
    out = tmp_path / "out"
    Official().export(source_from_run(RunDirectory(tmp_path / "run"), "last"), out)
    official = torch.load(out / "llm.pt", weights_only=True)
    assert {n: t.shape for n, t in official.items()} == {n: t.shape for n, t in before.items()}
    for name in ("vocab.json", "merges.txt"):
        (out / name).write_bytes((qwen_folder / name).read_bytes())
    theirs = AutoTokenizer.from_pretrained(out)
    special = {"additional_special_tokens": read_special_tokens("cosyvoice2")}
    theirs.add_special_tokens(
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **special}
    )
    ours = build(config.family.tokenizer, "tokenizer")
    for text in ("about ʃ<|endofprompt|>[breath] a b", *special["additional_special_tokens"]):
        assert theirs([text])["input_ids"] == [ours.encode(text)]
    assert ours.encode("about ʃ")[1:3] != ours.encode("a")


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("demo", [], "has the tokenizer of this family in its code"),
        ("cosyvoice2", ["family.text_vocabulary=152000"], "of 151936 text tokens, and this model"),
        ("cosyvoice2", ["family.tokenizer.folder=nowhere"], "folder as format.tokenizer="),
    ],
)
def test_an_official_file_that_the_runtime_could_not_use_is_refused(
    family, words, message, start, source, tmp_path
):
    source("demo")
    file = source_from_file(start(family, *words), str(tmp_path / "source.safetensors"))
    with pytest.raises(UserError, match=message):
        Official().export(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
