"""What is held out for validation: sentences, speakers, lists; never what cannot be used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cosyexp.data.splits import Split


def rows(texts: list[str], **columns: Any) -> list[dict[str, Any]]:
    """Rows of a preparation; a column is a list, or one value for all."""
    common = {"speaker": "s", "held_out": None, "fault": "", **columns}
    return [
        {"utt": f"u{i}", "text": text}
        | {name: value[i] if isinstance(value, list) else value for name, value in common.items()}
        for i, text in enumerate(texts)
    ]


def chosen(split: Split, found: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    choices = split.choose([split.candidate(row) for row in found])
    return [row for row, held_out in zip(found, choices, strict=True) if held_out]


TEXTS = [f"text {i}" for i in range(100)]


@pytest.mark.parametrize(("share", "count"), [(0.05, 5), (0.1, 10), (0.001, 1), (0.0, 0)])
def test_a_share_of_the_usable_is_held_out_whatever_their_order(share, count):
    found = rows(TEXTS, fault=["bad" if i % 2 else "" for i in range(100)])
    held_out = chosen(Split(held_out=share), found)
    assert len(held_out) == (max(round(count / 2), 1) if share else 0)
    assert not any(row["fault"] for row in held_out)
    again = chosen(Split(held_out=share), found[::-1])
    assert sorted(row["utt"] for row in again) == sorted(row["utt"] for row in held_out)


def test_no_sentence_is_in_both_splits():
    found = rows([f"Text  {i % 40}" if i < 40 else f"text {i % 40}" for i in range(80)])
    held_out = chosen(Split(held_out=0.2), found)
    assert len(held_out) == 16
    assert len({row["text"].split()[1] for row in held_out}) == 8


def test_speakers_are_held_out_whole():
    speakers = [f"s{i % 5}" for i in range(100)]
    held_out = chosen(Split(held_out=0.05, by="speaker"), rows(TEXTS, speaker=speakers))
    assert len(held_out) == 20 and len({row["speaker"] for row in held_out}) == 1


@pytest.mark.parametrize(
    "found", [rows(["one"]), rows(["same"] * 9), rows(["a", "b"], fault=["", "x"])]
)
def test_training_keeps_what_it_needs_and_the_log_says_so(found, said):
    assert not chosen(Split(), found)
    assert "nothing is held out for validation" in said.text


def test_two_utterances_are_one_for_each_split(said):
    assert len(chosen(Split(), rows(["a", "b"]))) == 1
    assert "1 utterances for training, 1 for validation, by sentence" in said.text


def test_a_list_names_utterances_or_speakers(tmp_path: Path, said):
    (tmp_path / "valid.txt").write_text("u3\nben\n\nnobody\n", encoding="utf-8")
    split = Split(held_out=str(tmp_path / "valid.txt"))
    speakers = ["anna"] * 98 + ["ben"] * 2
    held_out = chosen(split, rows(TEXTS, speaker=speakers))
    assert [row["utt"] for row in held_out] == ["u3", "u98", "u99"]
    assert not chosen(split, rows(["a"] * 3)) and "names no utterance and no speaker" in said.text


def test_the_corpus_s_own_split_is_kept_but_for_faults():
    found = rows(TEXTS[:4], held_out=[True, False, True, False], fault=["", "", "bad", ""])
    assert [row["utt"] for row in chosen(Split(), found)] == ["u0"]
