"""The sampler, keyed draws, shards, caches, and how bad rows are handled."""

import base64
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosyexp.data.cache import CachedField, compute_shard, is_cached
from cosyexp.data.collators.flow import FlowCollator
from cosyexp.data.collators.hifigan import VocoderCollator
from cosyexp.data.collators.llm import LanguageCollator
from cosyexp.data.collators.preference import PreferenceCollator
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import VALIDATION, Draws
from cosyexp.data.features import pitch, read_wave
from cosyexp.data.fields import (
    F0,
    Field,
    InstructTokens,
    Mel,
    SpeakerEmbedding,
    TextTokens,
    Wave,
)
from cosyexp.data.frontends.kmeans import KMeansTokenizer
from cosyexp.data.layout import Layout
from cosyexp.data.loader import Loader, LoaderState, ValidationLoader, dealt
from cosyexp.data.sampler import BatchSampler
from cosyexp.data.shards import COLUMNS, read_list, read_rows, write_shard
from cosyexp.data.tokenizers import PIECES, CharacterTokenizer, WhisperTokenizer, whisper_encoding
from cosyexp.data.utterance import Utterance
from cosyexp.errors import UserError
from tests.tones import tone

MEL: dict[str, Any] = {
    "n_fft": 1024,
    "hop": 256,
    "win": 1024,
    "bins": 80,
    "fmin": 0.0,
    "fmax": 8000.0,
}
Numbered = tuple[int, Any]  # a micro-batch with its number in the step
lengths = st.lists(st.integers(1, 500), min_size=1, max_size=200).map(np.array)


def llm_collator() -> LanguageCollator:
    """Returns the collator of the demo llm."""
    alphabet = CharacterTokenizer(alphabet=" abcdefghijklmnopqrstuvwxyz'.,?!-")
    layout = Layout(speaker=True, vocabulary=512)
    return LanguageCollator(
        tokenizer=alphabet,
        speech_vocabulary=512,
        speaker_dim=192,
        use_spk_embedding=False,
        layout=layout,
    )


def pair_collator() -> PreferenceCollator:
    """Returns the collator of pairs of the demo llm."""
    options: dict[str, Any] = {
        "speech_vocabulary": 512,
        "speaker_dim": 192,
        "use_spk_embedding": False,
        "layout": Layout(speaker=True, vocabulary=512),
    }
    return PreferenceCollator(
        tokenizer=CharacterTokenizer(alphabet=" abcdefghijklmnopqrstuvwxyz'.,?!-"), **options
    )


def flow_collator() -> FlowCollator:
    """Returns the collator of the demo flow."""
    return FlowCollator(
        speech_vocabulary=512,
        token_rate=50,
        speaker_dim=192,
        use_spk_embedding=False,
        sample_rate=16000,
        mel=MEL,
    )


def vocoder_collator() -> VocoderCollator:
    """Returns the collator of the demo vocoder."""
    return VocoderCollator(sample_rate=16000, mel=MEL, pitch="dio", segment=2048, harmonics=9)


# the sampler


@given(lengths, st.integers(0, 3), st.integers(1, 8), st.integers(100, 2000))
def test_an_epoch_has_every_row_once_within_the_budget(lengths, epoch, block, budget):
    batches = BatchSampler(lengths=lengths, budget=budget, seed=0).epoch(epoch, block)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= budget


@given(lengths, st.integers(1, 4))
def test_the_plan_is_a_function_of_its_arguments(lengths, block):
    plans = [BatchSampler(lengths=lengths, budget=800, seed=3).epoch(5, block) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*plans, strict=True))


def test_epochs_differ_and_blocks_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(10, 1000, 2000)
    sampler = BatchSampler(lengths=lengths, budget=4000, seed=0)
    first, second = sampler.epoch(0, 4), sampler.epoch(1, 4)
    assert {tuple(sorted(rows)) for rows in first} != {tuple(sorted(rows)) for rows in second}
    spreads = []
    for i in range(0, len(first) - 4, 4):
        max_tokens = [lengths[rows].max() for rows in first[i : i + 4]]
        spreads.append(max(max_tokens) - min(max_tokens))
    assert np.median(spreads) < 60  # of lengths up to 1000
    starts = [lengths[first[i]].max() for i in range(0, len(first), 4)]
    assert starts != sorted(starts)
    assert sampler.padding() < 0.1


def speech_like(count: int) -> np.ndarray:
    """Returns lengths in frames, as of read sentences."""
    return np.random.default_rng(0).lognormal(np.log(500), 0.6, count).clip(60, 3000).astype(int)


@pytest.mark.parametrize("budget", [2000, 20000])
def test_little_of_a_batch_is_padding(budget):
    assert (
        BatchSampler(
            lengths=np.minimum(speech_like(20000), budget), budget=budget, seed=0
        ).padding()
        < 0.03
    )


@given(
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=50).map(np.array),
    st.integers(0, 5),
)
def test_a_row_occurs_as_often_as_its_weight_says(repeats, epoch):
    sampler = BatchSampler(lengths=np.full(len(repeats), 10), budget=25, seed=0, repeats=repeats)
    times = np.bincount(np.concatenate(list(sampler.epoch(epoch, 1))), minlength=len(repeats))
    assert times.any() and (times <= np.ceil(repeats)).all()
    if times.sum() > 1:
        assert (times >= np.floor(repeats)).all()
    assert np.array_equal(
        np.concatenate(list(sampler.epoch(epoch, 1))), np.concatenate(list(sampler.epoch(epoch, 1)))
    )


def test_weights_are_means_over_epochs():
    repeats = np.repeat([0.25, 1.0, 2.5], 200)
    sampler = BatchSampler(lengths=np.full(600, 10), budget=100, seed=0, repeats=repeats)
    counts = [
        np.bincount(np.concatenate(list(sampler.epoch(epoch, 1))), minlength=600)
        for epoch in range(20)
    ]
    times = np.mean(counts, axis=0)
    assert np.abs(times.reshape(3, 200).mean(axis=1) - [0.25, 1.0, 2.5]).max() < 0.03
    assert (times[200:400] == 1).all() and len(set(times[:200].tolist())) > 3


# the loader


def steps_of(
    dataset: Dataset,
    *,
    ranks: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    count: int = 6,
    state: LoaderState | None = None,
) -> tuple[list[list[Numbered]], list[LoaderState]]:
    """Returns the micro-batches of all ranks at each step, and the state after it."""
    loaders = []
    for rank in range(ranks):
        sampler = BatchSampler(lengths=dataset.lengths, budget=700, seed=0)
        loader = Loader(
            dataset,
            sampler,
            seed=0,
            rank=rank,
            world=ranks,
            accumulate=accumulate,
            workers=workers,
            pin=False,
        )
        if state:
            loader.seek(state)
        loaders.append(loader)
    steps, places = [], []
    for _ in range(count):
        parts = [micro for loader in loaders for micro in loader.next_step()]
        steps.append(
            [(micro.number, micro.batch) for micro in sorted(parts, key=lambda micro: micro.number)]
        )
        assert len({loader.state for loader in loaders}) == 1
        places.append(loaders[0].state)
    for loader in loaders:
        loader.close()
    return steps, places


def same(a: Sequence[Numbered], b: Sequence[Numbered]) -> bool:
    """Whether numbers, utterances and noise of all micro-batches are equal."""
    return [i for i, _ in a] == [i for i, _ in b] and all(
        x.utts == y.utts and torch.equal(x.noise_BFT, y.noise_BFT)
        for (_, x), (_, y) in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def dataset(data: Path) -> Dataset:
    """The training data of the demo, for the flow."""
    return Dataset([str(data / "train.list")], flow_collator(), max_bad=0, processes=1)


def test_workers_need_neither_shared_memory_nor_open_files(dataset):
    """A container has little of one, a shell few of the other."""
    steps, _ = steps_of(dataset, accumulate=2, workers=2)
    tensors = [
        value
        for micro_batches in steps
        for _, batch in micro_batches
        for value in vars(batch).values()
        if isinstance(value, torch.Tensor)
    ]
    assert tensors and not any(tensor.is_shared() for tensor in tensors)


def test_ranks_accumulation_and_workers_give_the_same_steps(dataset):
    wanted, _ = steps_of(dataset, accumulate=4)
    for ranks, accumulate, workers in ((2, 2, 0), (4, 1, 0), (1, 4, 2)):
        found, _ = steps_of(dataset, ranks=ranks, accumulate=accumulate, workers=workers)
        assert all(same(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_place_is_the_whole_state(dataset):
    steps, places = steps_of(dataset, accumulate=2, count=12)
    assert places[-1].epoch > 0
    for stop in range(11):
        again, _ = steps_of(dataset, accumulate=2, count=1, state=places[stop])
        assert same(again[0], steps[stop + 1])


def test_an_epoch_begun_with_another_block_is_finished_in_its_order(dataset):
    steps, places = steps_of(dataset, accumulate=2, count=1)
    rest, _ = steps_of(dataset, accumulate=1, count=40, state=places[0])
    order = [
        b
        for rows in BatchSampler(lengths=dataset.lengths, budget=700, seed=0).epoch(0, 2)
        for b in rows
    ]
    seen = [utt for step in [*steps, *rest] for _, batch in step for utt in batch.utts][
        : len(order)
    ]
    assert sorted(seen) == sorted(dataset.row(i)[0] for i in range(len(dataset)))


def test_validation_is_the_same_however_it_is_divided(dataset):
    sampler = BatchSampler(lengths=dataset.lengths, budget=700, seed=0)

    def of(ranks, workers):
        loaders = [
            ValidationLoader(
                dataset, sampler, seed=0, rank=r, world=ranks, workers=workers, pin=False
            )
            for r in range(ranks)
        ]
        assert len({loader.rounds for loader in loaders}) == 1
        return sorted(
            ((m.number, m.batch) for loader in loaders for m in loader), key=lambda pair: pair[0]
        )

    wanted = of(1, 0)
    assert same(wanted, of(2, 0)) and same(wanted, of(3, 2))


# draws


def test_draws_depend_on_their_key_alone():
    one, two = Draws(0, 1), Draws(0, 1)
    two("b", "noise").random(100)
    assert one("a", "noise").random() == two("a", "noise").random()
    values = {
        Draws(s, e)(u, p).random()
        for s in (0, 1)
        for e in (VALIDATION, 0)
        for u in "ab"
        for p in ("t", "z")
    }
    assert len(values) == 16


def test_rows_draw_the_same_in_any_batch(dataset):
    draws = Draws(0, 0)
    together, alone = dataset.batch([4, 1], draws), dataset.batch([1], draws)
    frames = alone.mel_BFT.size(2)
    assert torch.equal(together.noise_BFT[1, :, :frames], alone.noise_BFT[0])
    assert (
        together.time_B[1] == alone.time_B[0]
        and together.prompt_lens_B[1] == alone.prompt_lens_B[0]
    )


def test_flow_draws_have_their_distributions(dataset):
    batches = [dataset.batch(range(len(dataset)), Draws(0, epoch)) for epoch in range(40)]
    prompts = torch.cat([batch.prompt_lens_B / batch.mel_lens_B for batch in batches])
    assert abs(torch.cat([batch.keep_B for batch in batches]).mean() - 0.8) < 0.05
    assert prompts.max() <= 0.3 and abs((prompts == 0).float().mean() - 0.5) < 0.1
    assert abs(torch.cat([batch.time_B for batch in batches]).mean() - 0.5) < 0.05


# fields and their cache


def test_cached_and_computed_are_the_same(data, tmp_path):
    shard = tmp_path / "00000.parquet"
    shutil.copy(data / "train" / "00000.parquet", shard)
    fields: list[Field] = [
        Mel(sample_rate=16000, **MEL),
        F0(16000, 256, "dio"),
        Wave(16000),
        SpeakerEmbedding("utt_embedding", 192),
    ]
    compute_shard(shard, fields)
    for field in fields:
        cached = CachedField(shard, field)
        for i, row in enumerate(read_rows(shard, ["utt", "audio_data", "utt_embedding"])):
            assert np.array_equal(cached[i], field(Utterance(row)))
    assert is_cached(shard, fields[0]) and not is_cached(
        shard, Mel(sample_rate=16000, **{**MEL, "fmax": None})
    )
    rows = list(read_rows(shard, pq.read_schema(shard).names))
    write_shard(shard, rows[:-1])
    assert not is_cached(shard, fields[0]), "a shard that was written anew is computed anew"


def test_computing_fields_leaves_the_trainer_its_threads(data, tmp_path):
    shutil.copy(data / "valid" / "00000.parquet", tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compute_shard(tmp_path / "00000.parquet", [Wave(16000)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_segments_of_wave_mel_and_f0_are_aligned(data):
    dataset = Dataset([str(data / "train.list")], vocoder_collator(), max_bad=0, processes=1)
    batch: Any = dataset.batch(range(6), Draws(0, 0))
    assert (
        batch.wave_BS.shape == (6, 2048)
        and batch.mel_BFT.shape == (6, 80, 8)
        and batch.f0_BT.shape == (6, 8)
    )
    for i in range(6):
        _, row = dataset.row(i)
        waves = [row["wave"][0, s * 256 : s * 256 + 2048] for s in range(row["mel"].shape[1] - 7)]
        (start,) = [
            s
            for s, wave in enumerate(waves)
            if np.array_equal(wave / np.float32(32767), batch.wave_BS[i].numpy())
        ]
        assert np.array_equal(row["mel"][:, start : start + 8], batch.mel_BFT[i].numpy())
        assert np.array_equal(row["f0"][0, start : start + 8], batch.f0_BT[i].numpy())


def test_an_utterance_shorter_than_a_segment_ends_in_silence(data):
    collator = VocoderCollator(
        sample_rate=16000, mel=MEL, pitch="dio", segment=256 * 1000, harmonics=9
    )
    dataset = Dataset([str(data / "valid.list")], collator, max_bad=0, processes=1)
    batch: Any = dataset.batch([0], Draws(0, 0))
    assert batch.wave_BS.shape == (1, 256000) and not batch.wave_BS[0, -256:].any()
    assert batch.f0_BT[0, -1] == 0 and batch.mel_BFT[0, :, -1].max() < -11


# a start reads the index alone


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    """A folder with four shards of three utterances, and their list."""
    rows = [
        row
        for shard in read_list(str(data / "train.list"))
        for row in read_rows(shard, COLUMNS.names)
    ][:12]
    for i in range(4):
        write_shard(tmp_path / f"{i}.parquet", rows[3 * i : 3 * i + 3])
    (tmp_path / "all.list").write_bytes(
        b"\xef\xbb\xbf0.parquet\r\n1.parquet\r\n\r\n2.parquet\r\n3.parquet"
    )
    return tmp_path


def open_dataset(
    folder: Path, collator: Callable[[], Any] = flow_collator, **options: Any
) -> Dataset:
    """Opens the data set of a list in a folder."""
    return Dataset([str(folder / "all.list")], collator(), max_bad=0.5, processes=1, **options)


def content_of(dataset: Dataset) -> list[tuple[str, dict[str, list[Any]]]]:
    """Returns the id and the fields of all rows."""
    return [
        (utt, {name: value.tolist() for name, value in row.items()})
        for utt, row in map(dataset.row, range(len(dataset)))
    ]


def test_a_second_start_reads_no_field(shards, monkeypatch):
    wanted = open_dataset(shards)
    content = content_of(wanted)
    opened = []

    def open_field(shard, field):
        opened.append(shard.stem)
        return CachedField(shard, field)

    monkeypatch.setattr("cosyexp.data.dataset.CachedField", open_field)
    again = open_dataset(shards)
    assert np.array_equal(again.lengths, wanted.lengths) and not opened
    assert again.row(4) and set(opened) == {"1"}
    monkeypatch.setattr("cosyexp.data.dataset.OPEN", 1)
    for _ in range(2):  # with so few files open, every shard is opened again
        opened.clear()
        assert content_of(again) == content and set(opened) == {"0", "1", "2", "3"}


def test_missing_and_rewritten_files_are_indexed_again(shards):
    content = content_of(open_dataset(shards))
    for pattern in ("index-*", "mel-*", "*"):
        for path in (shards / "2.fields").glob(pattern):
            path.unlink()
        assert content_of(open_dataset(shards)) == content
    rows = list(read_rows(shards / "1.parquet", COLUMNS.names))
    write_shard(shards / "1.parquet", rows[:1])
    assert content_of(open_dataset(shards)) == content[:4] + content[6:]


def test_a_limit_reads_no_more_than_it_needs(shards):
    content = content_of(open_dataset(shards, limit=4))
    assert len(content) == 4 and not (shards / "2.fields").exists()
    assert (
        content == content_of(open_dataset(shards))[:4]
        and len(open_dataset(shards, limit=99)) == 12
    )


def test_longer_utterances_are_left_out_and_named(shards, caplog):
    logging.getLogger("cosyexp").propagate = True
    everything = open_dataset(shards)
    longest = int(np.sort(everything.lengths)[-3])
    with caplog.at_level(logging.WARNING, "cosyexp"):
        dataset = open_dataset(shards, longest=longest)
    assert (
        sorted(dataset.lengths) == sorted(everything.lengths)[:10]
        and "2 of 12 utterances are longer than data.longest=" in caplog.text
    )
    left = {utt for utt, _ in content_of(everything)} - {utt for utt, _ in content_of(dataset)}
    assert len(left) == 2 and all(utt in caplog.text for utt in left)
    with pytest.raises(UserError, match=r"longer than data\.longest=1: use a larger value"):
        open_dataset(shards, longest=1)


def test_an_id_that_occurs_twice_is_named(shards, caplog):
    rows = [list(read_rows(shards / f"{i}.parquet", COLUMNS.names)) for i in (0, 3)]
    write_shard(shards / "3.parquet", [rows[1][0], rows[0][1]])
    logging.getLogger("cosyexp").propagate = True
    with caplog.at_level(logging.WARNING, "cosyexp"):
        assert len(open_dataset(shards)) == 11
    assert f"1 utterances have the id of an earlier one: {rows[0][1]['utt']}" in caplog.text


def test_lists_have_their_weights(shards):
    lists = [str(shards / "0.parquet"), str(shards / "all.list")]
    dataset = Dataset(lists, flow_collator(), max_bad=0, processes=1, repeats=[0.5, 2])
    assert dataset.repeats is not None
    assert dataset.repeats.tolist() == [0.5] * 3 + [2] * 12
    for wrong in ([1], [1, 0], [1, 2, 3], [1, float("nan")]):
        with pytest.raises(
            UserError, match=r"data\.repeats=.*: give a number above 0 for each of the 2 lists"
        ):
            Dataset(lists, flow_collator(), max_bad=0, processes=1, repeats=wrong)


def write_vocabulary(path: Path, codes: Iterable[int]) -> None:
    """Writes a vocabulary of Whisper's size; the pieces behind the single bytes are in no text."""
    pieces = [bytes([code]) for code in codes]
    pieces += [b"\xff" + i.to_bytes(3, "big") for i in range(PIECES - len(pieces))]
    path.write_text(
        "".join(f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(pieces))
    )


def test_another_vocabulary_gives_other_ids(shards):
    def collator():
        changed = llm_collator()
        changed.fields = {
            **changed.fields,
            "text": TextTokens(WhisperTokenizer(vocabulary=str(shards / "a.tiktoken"))),
        }
        return changed

    def write(codes):
        write_vocabulary(shards / "a.tiktoken", codes)
        whisper_encoding.cache_clear()

    write(range(256))
    before = content_of(open_dataset(shards, collator))
    write(reversed(range(256)))
    after = content_of(open_dataset(shards, collator))
    for (_, old), (_, new) in zip(before, after, strict=True):
        assert (np.array(old["text"]) == 255 - np.array(new["text"])).all()


def test_files_as_the_original_writes_them(shards):
    """pandas makes lists of float64 and int64; optional columns are missing, and rejects null."""
    wide = {
        "utt_embedding": pa.list_(pa.float64()),
        "speech_token": pa.list_(pa.int64()),
        "audio_data": pa.large_binary(),
    }
    for path in shards.glob("*.parquet"):
        table = pq.read_table(path).drop_columns(["spk_embedding", "wav"])
        table = table.append_column(
            "reject_speech_token", pa.array([None] * len(table), pa.list_(pa.int64()))
        )
        schema = pa.schema(
            [(f.name, wide.get(f.name, f.type)) for f in table.schema], {"pandas": "{}"}
        )
        pq.write_table(table.cast(schema), path.with_suffix(".new"))
    content = {
        collator: content_of(open_dataset(shards, collator))
        for collator in (llm_collator, flow_collator, vocoder_collator)
    }
    for path in shards.glob("*.new"):
        path.replace(path.with_suffix(".parquet"))
    assert {collator: content_of(open_dataset(shards, collator)) for collator in content} == content


# bad rows


def spoil(data: Path, folder: Path, change: Callable[[int, dict[str, Any]], None]) -> str:
    """Copies a shard, whose rows `change` modifies; returns the path of its list."""
    rows = [
        dict(row)
        for row in read_rows(
            data / "train" / "00000.parquet", pq.read_schema(data / "train" / "00000.parquet").names
        )
    ]
    for i, row in enumerate(rows):
        change(i, row)
    write_shard(folder / "bad.parquet", rows)
    (folder / "bad.list").write_text("bad.parquet\n")
    return str(folder / "bad.list")


@pytest.mark.parametrize(
    ("column", "value", "collator", "reason"),
    [
        ("speech_token", [], llm_collator, "no speech_token"),
        ("speech_token", None, flow_collator, "no speech_token"),
        (
            "speech_token",
            [3, 900],
            flow_collator,
            "speech token 900 is outside the vocabulary of 512",
        ),
        (
            "speech_token",
            [3] * 5,
            flow_collator,
            "the 5 speech tokens last 0.1 s at 50 per second, but the audio lasts",
        ),
        ("text", "", llm_collator, "no text"),
        ("text", "日本", llm_collator, "no character that the tokenizer knows"),
        ("speech_token", [3, None], llm_collator, "speech_token is not a list of finite numbers"),
        ("utt_embedding", [0.0] * 7, llm_collator, "7 numbers instead of 192"),
        (
            "utt_embedding",
            [float("nan")] * 192,
            llm_collator,
            "utt_embedding is not a list of finite numbers",
        ),
        ("audio_data", b"RIFF....", vocoder_collator, "cannot be decoded"),
        ("audio_data", None, vocoder_collator, "no audio_data"),
    ],
)
def test_a_bad_row_is_named_and_left_out(data, tmp_path, caplog, column, value, collator, reason):
    path = spoil(data, tmp_path, lambda i, row: row.update({column: value}) if i == 2 else None)
    logging.getLogger("cosyexp").propagate = True
    with caplog.at_level(logging.WARNING, "cosyexp"):
        dataset = Dataset([path], collator(), max_bad=0.5, processes=1)
    names = [row["utt"] for row in read_rows(tmp_path / "bad.parquet", ["utt"])]
    assert len(dataset) == len(names) - 1 and names[2] not in {
        dataset.row(i)[0] for i in range(len(dataset))
    }
    assert names[2] in caplog.text and reason in caplog.text
    with pytest.raises(UserError, match=r"max_bad=0\.01"):
        Dataset([path], collator(), max_bad=0.01, processes=1)


@pytest.mark.parametrize(
    ("column", "value", "collator", "reason"),
    [
        ("speech_token", "1 2 3", llm_collator, "speech_token is not a list of finite numbers"),
        ("speech_token", 3, llm_collator, "speech_token is not a list of finite numbers"),
        ("speech_token", [[1, 2], [3]], llm_collator, "speech_token is not a list of numbers"),
        ("speech_token", [{"id": 1}], llm_collator, "speech_token is not a list of finite numbers"),
        ("speech_token", [1.5, 2], llm_collator, "speech tokens are not integers"),
        ("speech_token", [2**40], llm_collator, "outside the vocabulary of 512"),
        ("utt_embedding", 0.5, llm_collator, "utt_embedding is not a list of finite numbers"),
        ("utt_embedding", b"123", llm_collator, "utt_embedding is not a list of numbers"),
        ("text", 7, llm_collator, "is not a string"),
        ("audio_data", 1, vocoder_collator, "not the bytes of an audio file"),
        ("audio_data", [82, 73], vocoder_collator, "not the bytes of an audio file"),
        ("utt", 5, llm_collator, "the column 'utt' of .* has the type int64 instead of string"),
    ],
)
def test_a_column_of_another_type_is_refused(data, tmp_path, column, value, collator, reason):
    table = pq.read_table(data / "valid" / "00000.parquet")
    pq.write_table(
        table.drop_columns([column]).append_column(column, pa.array([value] * len(table))),
        tmp_path / "odd.parquet",
    )
    with pytest.raises(UserError, match=reason):
        Dataset([str(tmp_path / "odd.parquet")], collator(), max_bad=0, processes=1)


def test_embeddings_may_be_bytes_and_ids_may_lack(data, tmp_path):
    table = pq.read_table(data / "valid" / "00000.parquet")
    packed = [np.array(x, np.float32).tobytes() for x in table["utt_embedding"].to_pylist()]
    odd = table.drop_columns(["utt", "utt_embedding"])
    odd = odd.append_column("utt", pa.array([None] * len(table), pa.string())).append_column(
        "utt_embedding", pa.array(packed)
    )
    pq.write_table(table, tmp_path / "plain.parquet")
    pq.write_table(odd, tmp_path / "odd.parquet")
    plain, odd = (
        Dataset([str(tmp_path / f"{name}.parquet")], llm_collator(), max_bad=0, processes=1)
        for name in ("plain", "odd")
    )
    assert len(odd) == len(plain) and odd.row(1)[0] == "odd:1"
    assert all(
        np.array_equal(odd.row(i)[1]["speaker"], plain.row(i)[1]["speaker"])
        for i in range(len(odd))
    )


def test_a_row_without_a_pair_is_no_fault_but_a_wrong_answer_is(data, tmp_path, caplog):
    answers = [None, [], [3, 900]]
    path = spoil(
        data,
        tmp_path,
        lambda i, row: row.update(reject_speech_token=answers[i] if i < 3 else [1, 2, 3]),
    )
    count = len(list(read_rows(tmp_path / "bad.parquet", ["utt"])))
    logging.getLogger("cosyexp").propagate = True
    with caplog.at_level(logging.WARNING, "cosyexp"):
        assert len(Dataset([path], pair_collator(), max_bad=1 / count, processes=1)) == count - 3
    assert (
        f"3 of {count} utterances left out" in caplog.text
        and caplog.text.count("it has no reject_speech_token") == 2
    )
    with pytest.raises(UserError, match=f"1 of {count} utterances .*900 is outside the vocabulary"):
        Dataset([path], pair_collator(), max_bad=0, processes=1)


def test_the_error_of_data_without_pairs_names_the_command_that_makes_them(data):
    with pytest.raises(
        UserError,
        match=r"it has no reject_speech_token\): make .* with cosyexp\.prefer, see docs/dpo\.md",
    ):
        Dataset([str(data / "train.list")], pair_collator(), max_bad=0, processes=1)


def test_not_more_than_some_are_named(shards, caplog, monkeypatch):
    monkeypatch.setattr("cosyexp.data.dataset.NAMED", 2)
    for path in shards.glob("*.parquet"):
        write_shard(
            path,
            [
                {**row, "text": "" if i else row["text"]}
                for i, row in enumerate(read_rows(path, COLUMNS.names))
            ],
        )
    logging.getLogger("cosyexp").propagate = True
    with caplog.at_level(logging.WARNING, "cosyexp"):
        assert len(Dataset([str(shards / "all.list")], llm_collator(), max_bad=1, processes=1)) == 4
    assert (
        "8 of 12 utterances left out" in caplog.text
        and caplog.text.count("it has no text") == 2
        and "; ..." in caplog.text
    )


def test_no_row_at_all(data, tmp_path):
    path = spoil(data, tmp_path, lambda i, row: row.update(speech_token=None))
    with pytest.raises(UserError, match="has no usable utterance"):
        Dataset([path], llm_collator(), max_bad=1.0, processes=1)


def test_lists_and_shards_that_cannot_be_read(data, tmp_path):
    whole = (data / "train" / "00000.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "empty.list").write_text("\n")
    (tmp_path / "gone.list").write_text("gone.parquet\n")
    for name, message in (
        ("half.parquet", "half.parquet is not a readable parquet"),
        ("other.parquet", "other.parquet is not a readable parquet"),
        ("empty.list", "empty.list is empty"),
        ("gone.list", "no data file gone.parquet"),
        ("nowhere.list", "no data list"),
    ):
        with pytest.raises(UserError, match=message):
            Dataset([str(tmp_path / name)], llm_collator(), max_bad=0, processes=1)
    assert read_list(str(data / "train.list"))[0].exists()


# the front ends


def test_speech_tokens_are_the_nearest_centroids():
    draw = np.random.default_rng(0)
    waves = [draw.standard_normal(16000).astype(np.float32) * 0.1 for _ in range(3)]
    tokenizer = KMeansTokenizer.fit(waves, codes=20, rate=50, seed=0)
    tokens = tokenizer.encode(waves[0])
    assert len(tokens) == 50 and set(tokens) <= set(range(20))
    again = KMeansTokenizer.fit(waves, codes=20, rate=50, seed=0)
    assert torch.equal(tokenizer.codes_KF, again.codes_KF)
    assert len(KMeansTokenizer.fit(waves, codes=20, rate=25, seed=0).encode(waves[0])) == 25
    with pytest.raises(ValueError, match="too few for 1000"):
        KMeansTokenizer.fit(waves, codes=1000, rate=50, seed=0)


def test_prepared_front_ends_are_kept_for_new_speech(data):
    from cosyexp.data.frontends.mel_speaker import MelSpeakerEncoder

    tokenizer = KMeansTokenizer.load(data / "speech_tokenizer.safetensors")
    speaker = MelSpeakerEncoder.load(data / "speaker_encoder.safetensors")
    row = next(
        iter(
            read_rows(
                data / "valid" / "00000.parquet",
                ["utt", "audio_data", "speech_token", "utt_embedding"],
            )
        )
    )
    wave = read_wave(row["audio_data"], 16000)
    assert tokenizer.encode(wave) == row["speech_token"]
    assert np.allclose(speaker.encode(wave), row["utt_embedding"], atol=1e-4)


def test_speaker_embeddings_tell_voices_apart(data):
    rows = [
        row
        for shard in read_list(str(data / "valid.list"))
        for row in read_rows(shard, ["utt", "spk", "utt_embedding", "spk_embedding"])
    ]
    own = [np.linalg.norm(np.subtract(r["utt_embedding"], r["spk_embedding"])) for r in rows]
    means = {r["spk"]: r["spk_embedding"] for r in rows}
    for row, distance in zip(rows, own, strict=True):
        others = [
            np.linalg.norm(np.subtract(row["utt_embedding"], mean))
            for spk, mean in means.items()
            if spk != row["spk"]
        ]
        assert distance < min(others)


def test_an_instruction_is_the_row_s_or_else_the_family_s():
    field = InstructTokens(CharacterTokenizer(alphabet="abc"), "cab")
    assert field(Utterance({"instruct": "ab"})).tolist() == [1, 2]
    assert field(Utterance({"instruct": ""})).tolist() == field(Utterance({})).tolist() == [3, 1, 2]
    with pytest.raises(ValueError, match="is not a string"):
        field(Utterance({"instruct": 3}))


def test_a_missing_tokenizer_is_no_fault_of_the_rows(data, tmp_path):
    """It ends the command, and the same command succeeds once the file is there."""
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.fields"))
    collator = llm_collator()
    collator.fields = {
        **collator.fields,
        "text": TextTokens(WhisperTokenizer(vocabulary=str(tmp_path / "a.tiktoken"))),
    }
    lists = [str(tmp_path / "data" / "train.list")]
    with pytest.raises(UserError, match=r"family\.tokenizer\.vocabulary="):
        Dataset(lists, collator, max_bad=0, processes=1)
    write_vocabulary(tmp_path / "a.tiktoken", range(256))
    assert len(Dataset(lists, collator, max_bad=0, processes=1)) > 0


@pytest.mark.parametrize(("batches", "ranks"), [(5, 2), (4, 2), (1, 3)])
def test_even_ranks_have_equally_many_micro_batches_and_each_counts_once(batches, ranks):
    rows = [np.array([i]) for i in range(batches)]
    dealings = [dealt(rows, rank, ranks, equal_batches=True) for rank in range(ranks)]
    assert len({len(dealing) for dealing in dealings}) == 1
    together = sorted((number, int(row[0])) for dealing in dealings for number, row in dealing)
    assert together == [(i, min(i, batches - 1)) for i in range(len(together))]
    assert (
        sum(len(dealt(rows, rank, ranks, equal_batches=False)) for rank in range(ranks)) == batches
    )


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_the_fast_method_of_f0_agrees_with_harvest(seconds):
    wave = read_wave(tone(seconds, np.random.default_rng(0)), 22050)
    fast, harvest = (pitch(wave, 22050, 256, method) for method in ("fast", "harvest"))
    assert len(fast) == len(harvest) == len(wave) // 256
    voiced = (fast > 0) & (harvest > 0)
    assert voiced.mean() > 0.9 and np.median(np.abs(fast - harvest)[voiced]) < 0.1
