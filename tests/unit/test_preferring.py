"""Preference pairs of a trained llm: decoding in batches, scores, and the folder of pairs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor

from cosyexp.config import PreferConfig, parse
from cosyexp.data.draws import keyed
from cosyexp.data.shards import COLUMNS, read_list, read_rows, write_list, write_shard
from cosyexp.errors import UserError
from cosyexp.models.llm.decoding import decode, decode_batch
from cosyexp.models.llm.sampling import drawn_from, greedy, nucleus
from cosyexp.preferences import write
from cosyexp.preferences.scores import EditDistance, edit_distance, select_pair
from cosyexp.preferences.write import BEGUN, write_pairs
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import read_tensors
from tests.support import config
from tests.unit.runs import add, make_run
from tests.unit.test_llm import FAMILIES, SPEAKER, SPEECHES, network

# decoding


def step(net: Any, token: Tensor, cache: Tensor) -> Any:
    """Decodes one token of every row."""
    return net.decode(net.speech_embedding(token).unsqueeze(1), cache)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_in_a_batch_is_generated_as_alone(family):
    net = network(family).double().eval()
    text, speaker = (
        torch.tensor([[1, 2, 3]] * 3 + [[4, 0, 2]] * 3),
        torch.randn(6, SPEAKER).double(),
    )
    choose = [
        partial(nucleus, draw=drawn_from(torch.Generator().manual_seed(seed)), top_p=1.0)
        for seed in range(6)
    ]
    least, most = 2, 60
    x = net.prompt(text, speaker)
    together: list[list[int]] = [[] for _ in choose]
    sizes = []

    def counted(token, cache):
        sizes.append(len(token))
        return step(net, token, cache)

    logp, cache = net.decode(x, net.empty_cache(x))
    limits = [(least, most)] * len(text)
    for tokens in decode_batch(
        logp, cache, counted, choose, speech_vocabulary=SPEECHES, limits=limits
    ):
        for row, token in tokens.items():
            together[row].append(token)
    for row, answer in enumerate(together):
        x = net.prompt(text[row : row + 1], speaker[row : row + 1])
        alone = partial(nucleus, draw=drawn_from(torch.Generator().manual_seed(row)), top_p=1.0)
        logp, cache = net.decode(x, net.empty_cache(x))
        own: dict[str, Any] = {
            "speech_vocabulary": SPEECHES,
            "min_tokens": least,
            "max_tokens": most,
        }
        assert answer == list(decode(logp, cache, partial(step, net), alone, **own))
    lengths = list(map(len, together))
    assert min(lengths) >= least and len(set(lengths)) > 2  # rows end at other times
    assert sizes == [
        sum(length > i for length in lengths) for i in range(max(lengths))
    ]  # and leave the batch


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@torch.no_grad()
def test_a_batch_ends_at_the_longest(max_tokens):
    net = network(FAMILIES[1])
    x = net.prompt(torch.tensor([[1, 2]] * 2))
    choose = [partial(greedy, draw=None)] * 2  # type: ignore[arg-type]
    logp, cache = net.decode(x, net.empty_cache(x))
    limits = [(max_tokens, max_tokens)] * 2
    found = list(
        decode_batch(
            logp, cache, partial(step, net), choose, speech_vocabulary=SPEECHES, limits=limits
        )
    )
    assert len(found) == max_tokens and all(tokens[0] == tokens[1] for tokens in found)


# scores


def test_an_edit_distance_is_a_share_of_the_longer_one():
    assert (
        edit_distance([1, 2, 3, 4], [2, 3, 4]) == 0.25
        and edit_distance([], []) == 0
        and edit_distance([], [1]) == 1
    )


def test_the_chosen_and_the_rejected_answer():
    row, edit = {"speech_token": [1, 2, 3, 4]}, EditDistance()
    answers = [[1, 2], [5], [], [1, 2, 3], [6]]
    assert select_pair(row, [[1, 2]], None, 9) == ([1, 2, 3, 4], [1, 2])
    assert select_pair(row, [[], [1, 2, 3, 4], [5]], None, 9) == ([1, 2, 3, 4], [5])
    assert select_pair(row, answers, edit, 9) == ([1, 2, 3], [6])
    # an answer of max_tokens did not end by itself
    assert select_pair(row, answers, edit, 3) == ([1, 2], [1, 2, 3])


@pytest.mark.parametrize(
    ("candidates", "score", "reason"),
    [
        ([[]], None, "empty"),
        ([[], []], EditDistance(), "empty"),
        ([[1, 2, 3, 4]], None, "equal to the ground truth"),
        ([[5], [6]], EditDistance(), "no candidate better than another"),
        ([[1, 2], []], EditDistance(), "no candidate better than another"),
        ([[2] * 9, [1] * 9], EditDistance(), "no candidate better than another"),
    ],
)
def test_candidates_that_make_no_pair(candidates, score, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        select_pair({"speech_token": [1, 2, 3, 4]}, candidates, score, 9)


# a folder of pairs


EDIT = {"_target_": "cosyexp.preferences.scores.EditDistance"}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose network was not trained; its answers end now and then."""
    run_config = config("llm", data, "family.speech_per_text=[0.5,2]")
    torch.manual_seed(0)
    run = make_run(tmp_path_factory.mktemp("run"), run_config)
    weights = build(run_config.network, "network").state_dict()
    weights["llm_decoder.bias"][run_config.family.speech_vocabulary] += 3
    add(run, 1, {"loss": 1.0}, weights)
    return run


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data` node of a config.

    It has 14 utterances in three shards to train on and 3 to validate on; two cannot be used.
    """
    folder = tmp_path_factory.mktemp("source")
    rows = [
        row
        for shard in read_list(str(data / "train.list"))
        for row in read_rows(shard, COLUMNS.names)
    ][:17]
    rows[3]["text"], rows[15]["speech_token"] = "", None
    shards = [folder / f"{name}.parquet" for name in "abcd"]
    for shard, begin, end in zip(shards, (0, 5, 10, 14), (5, 10, 14, 17), strict=True):
        write_shard(shard, rows[begin:end])
    write_list(folder / "train.list", shards[:3])
    return {
        "train": str(folder / "train.list"),
        "valid": [str(shards[3])],
        "speakers": str(data / "speakers.safetensors"),
        "dir": None,
    }


def prefer(
    run: RunDirectory, source: Mapping[str, Any], out: Path, **options: Any
) -> dict[str, Any]:
    """Writes pairs with some options of the command, and returns their meta.yaml."""
    values = {"run_dir": str(run), "data": source, "out": str(out), **options}
    return write_pairs(parse(PreferConfig, values))


@pytest.fixture(scope="module")
def pairs(
    run: RunDirectory, source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder of pairs, and its meta.yaml."""
    out = tmp_path_factory.mktemp("pairs") / "out"
    return out, prefer(run, source, out, candidates=2)


def contents(out: Path) -> dict[str, bytes]:
    """Returns the content of all files in a folder."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def table(out: Path) -> list[dict[str, Any]]:
    """Returns all rows of a folder of pairs."""
    return [
        row
        for name in ("train", "valid")
        for shard in read_list(str(out / f"{name}.list"))
        for row in pq.read_table(shard).to_pylist()
    ]


def test_the_folder_has_the_rows_of_the_data_and_an_answer_to_reject(pairs, source):
    out, meta = pairs
    lists, shards = (
        ["train.list", "valid.list"],
        ["train/00000", "train/00001", "train/00002", "valid/00000"],
    )
    assert set(contents(out)) == {
        "meta.yaml",
        *(f"{name}.safetensors" for name in ("speakers", "speech_tokenizer", "speaker_encoder")),
        *lists,
        *(f"{shard}.parquet" for shard in shards),
    }
    originals = [
        row
        for name in (source["train"], source["valid"][0])
        for shard in read_list(name)
        for row in read_rows(shard, COLUMNS.names)
    ]
    rows = table(out)
    assert [{**row, "reject_speech_token": 0} for row in originals] == [
        {**row, "reject_speech_token": 0} for row in rows
    ]
    assert [i for i, row in enumerate(rows) if row["reject_speech_token"] is None] == [3, 15]
    assert (meta["utterances"], meta["pairs"], meta["skipped"]) == (17, 15, {"unusable": 2})
    distances = [
        edit_distance(r["speech_token"], r["reject_speech_token"])
        for r in rows
        if r["reject_speech_token"]
    ]
    assert meta["distance"] == pytest.approx(np.mean(distances)) and 0 < meta["distance"] <= 1
    assert meta["settings"]["token_rate"] == 50
    assert (
        read_tensors(out / "speakers.safetensors").keys()
        == read_tensors(out.parent / source["speakers"]).keys()
    )


def test_candidates_do_not_depend_on_what_they_are_batched_with(pairs, run, source, tmp_path):
    for size in (1, 3):
        prefer(run, source, tmp_path / str(size), candidates=2, batch_size=size)
        assert table(tmp_path / str(size)) == table(pairs[0])
    # the second candidate is another draw
    prefer(run, source, tmp_path / "one", candidates=1)
    assert table(tmp_path / "one") == table(pairs[0])
    prefer(run, source, tmp_path / "seed", seed=1)
    ours, theirs = (
        [row["reject_speech_token"] for row in table(out)] for out in (tmp_path / "seed", pairs[0])
    )
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) == 2  # those without


def test_each_answer_has_its_own_key_of_draws():
    seeds = [
        int(keyed(seed, utt, "prefer", k).integers(2**63))
        for seed in (0, 1)
        for utt in ("a", "b")
        for k in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)


def test_the_best_and_the_worst_by_their_distance(pairs, run, source, tmp_path):
    meta = prefer(run, source, tmp_path / "out", candidates=3, score=EDIT)
    truths = [row["speech_token"] for row in table(pairs[0])]
    for truth, row in zip(truths, table(tmp_path / "out"), strict=True):
        if row["reject_speech_token"] is None:
            assert row["speech_token"] == truth
        else:
            chosen, rejected = row["speech_token"], row["reject_speech_token"]
            max_tokens = 2 * len(row["text"])
            assert len(chosen) < max_tokens
            assert len(rejected) == max_tokens or edit_distance(truth, chosen) < edit_distance(
                truth, rejected
            )
    assert meta["pairs"] > 8 and meta["settings"]["score"] == EDIT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": EDIT}, "there is one: give candidates=2, or score=none"),
        (
            {"score": {"_target_": "cosyexp.averaging.methods.Uniform"}, "candidates": 2},
            "not a registered score",
        ),
        ({"score": {"_target_": "os.system"}, "candidates": 2}, "not a registered score"),
        ({"score": "edit", "candidates": 2}, "score='edit' is not a mapping with a _target_"),
        (
            {
                "score": {
                    "_target_": "cosyexp.preferences.asr_score.WordErrorRate",
                    "llm": "a",
                    "flow": None,
                    "hifigan": None,
                },
                "candidates": 2,
            },
            "give flow=<run> and hifigan=<run>",
        ),
    ],
)
def test_a_score_that_cannot_be_used_is_refused(run, source, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prefer(run, source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_run_must_be_one_of_an_llm(data, source, tmp_path):
    run = make_run(tmp_path / "run", config("flow", data))
    with pytest.raises(UserError, match="is a run of flow: give one of an llm as run_dir="):
        prefer(run, source, tmp_path / "out")


@pytest.mark.parametrize("stopped_at", [1, 3])
def test_a_stopped_command_goes_on_where_it_was(
    pairs, run, source, tmp_path, monkeypatch, stopped_at
):
    out, written = tmp_path / "out", list[Path]()

    def write_some(path, *arguments):
        if len(written) == stopped_at:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *arguments)

    monkeypatch.setattr(write, "write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        prefer(run, source, out, candidates=2)
    assert (out / BEGUN).exists() and not (out / "meta.yaml").exists()
    times = {path: path.stat().st_mtime_ns for path in written}
    for other, message in (
        ({"candidates": 3}, "candidates=2, not 3"),
        ({"candidates": 2, "limit": 4}, "limit=None, not 4"),
        ({"candidates": 2, "seed": 7}, "seed=0, not 7"),
        ({"candidates": 2, "score": EDIT}, "score.*=None, not .*EditDistance"),
    ):
        with pytest.raises(UserError, match=f"was begun with {message}.*: repeat the old command"):
            prefer(run, source, out, **other)
    with pytest.raises(UserError, match="was begun with other data"):
        prefer(run, {**source, "train": source["valid"]}, out, candidates=2)
    stopped_at = 9
    assert prefer(run, source, out, candidates=2) == pairs[1]
    assert contents(out) == contents(pairs[0])
    assert times == {path: path.stat().st_mtime_ns for path in times} and len(written) == 4


def test_a_complete_folder_is_not_written_again(pairs, run, source):
    before = contents(pairs[0])
    assert prefer(run, source, pairs[0], candidates=2, batch_size=5) == pairs[1]
    assert contents(pairs[0]) == before


def test_the_first_utterances_of_each_split(pairs, run, source, tmp_path):
    meta = prefer(run, source, tmp_path / "out", limit=7)
    rows = table(pairs[0])
    assert table(tmp_path / "out") == rows[:7] + rows[14:] and meta["utterances"] == 10
    assert (tmp_path / "out/train.list").read_text() == "train/00000.parquet\ntrain/00001.parquet\n"


def test_a_folder_of_something_else_is_left_alone(run, source, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than pairs"):
        prefer(run, source, tmp_path)
    before = contents(data)
    with pytest.raises(UserError, match="give another out="):
        prefer(run, source, data)
    assert contents(data) == before


def test_the_settings_are_plain(pairs):
    settings = yaml.safe_load((pairs[0] / "meta.yaml").read_text())["settings"]
    assert (
        settings["candidates"] == 2 and settings["score"] is None and len(settings["weights"]) == 64
    )
