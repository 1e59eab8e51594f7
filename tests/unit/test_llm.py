"""The speech-token language models, their encoders, layouts, and sampling."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cosyexp.data.collators.llm import LanguageBatch, LanguageCollator
from cosyexp.data.draws import Draws
from cosyexp.data.layout import Layout
from cosyexp.data.tokenizers import CharacterTokenizer
from cosyexp.models.layers.attention import by_key
from cosyexp.models.layers.encoder import Encoder, chunk_mask
from cosyexp.models.llm.decoding import decode, decode_in_blocks
from cosyexp.models.llm.qwen_lm import QwenLM
from cosyexp.models.llm.sampling import drawn_from, greedy, nucleus, ras
from cosyexp.models.llm.transformer_lm import TransformerLM

TEXTS, SPEECHES, SPEAKER = 20, 30, 6
LAYOUTS = {
    "cosyvoice": Layout(speaker=True, vocabulary=SPEECHES),
    "cosyvoice2": Layout(
        speaker=False, vocabulary=SPEECHES, fill_token=2, interleaved=1.0, block=(2, 3)
    ),
    "cosyvoice3": Layout(
        speaker=False, vocabulary=SPEECHES, eos=1, fill_token=3, interleaved=0.5, block=(2, 3)
    ),
}
FAMILIES = list(LAYOUTS)
Row = dict[str, Any]


def encoder(
    in_width: int, layer: str = "transformer", chunk: int = 1, dropout: float = 0.0
) -> Encoder:
    """Returns a small encoder."""
    return Encoder(
        in_width, width=16, heads=2, hidden=24, blocks=2, layer=layer, chunk=chunk, dropout=dropout
    )


def network(family: str) -> Any:
    """Returns a small language model of a family, in double precision."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"text_vocabulary": TEXTS, "speech_vocabulary": SPEECHES}
    if family == "cosyvoice":
        parts: dict[str, Any] = {"text_encoder": encoder(12, "conformer"), "llm": encoder(16)}
        return TransformerLM(**sizes, text_width=12, speaker_dim=SPEAKER, **parts).double().eval()
    qwen: dict[str, Any] = {"width": 16, "layers": 2, "heads": 4, "key_heads": 2, "hidden": 24}
    special: dict[str, Any] = (
        {"special_tokens": 3, "sos_task_ids": None, "bias": True}
        if family == "cosyvoice2"
        else {"special_tokens": 9, "sos_task_ids": (0, 2), "bias": False}
    )
    net = QwenLM(**sizes, **qwen, **special).double().eval()
    with torch.no_grad():
        for parameter in net.llm.parameters():
            parameter.mul_(5)  # Qwen2 starts so small that its positions differ little
    return net


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of a family."""
    name: str = request.param
    return name


@pytest.fixture
def net(family: str) -> Any:
    """A small language model of the family."""
    return network(family)


def collator(family: str) -> LanguageCollator:
    """Returns the collator of a family."""
    options: dict[str, Any] = {
        "speech_vocabulary": SPEECHES,
        "speaker_dim": SPEAKER,
        "use_spk_embedding": False,
    }
    return LanguageCollator(
        tokenizer=CharacterTokenizer(alphabet="a"), layout=LAYOUTS[family], **options
    )


def rows(family: str) -> list[Row]:
    """Returns three rows of different lengths.

    The first two have enough speech for blocks; rows of cosyvoice3 have an instruction.
    """
    draw = np.random.default_rng(0)
    found = []
    for text, speech, instruct in ((5, 9, 2), (3, 14, 1), (7, 1, 3)):
        row = {
            "text": draw.integers(TEXTS, size=(1, text)),
            "speech": draw.integers(SPEECHES, size=(1, speech)),
        }
        if family == "cosyvoice3":
            row["instruct"] = draw.integers(TEXTS, size=(1, instruct))
        found.append({**row, "speaker": draw.standard_normal((SPEAKER, 1))})
    return found


def collate(family: str, chosen: Sequence[tuple[int, Row]]) -> LanguageBatch:
    """Returns a batch of numbered rows."""
    return collator(family).collate(
        [f"utt {i}" for i, _ in chosen], [row for _, row in chosen], Draws(4, 0)
    )


@pytest.fixture
def batch(family: str) -> LanguageBatch:
    """A batch of all rows of the family."""
    return collate(family, list(enumerate(rows(family))))


def logits(net: Any, batch: LanguageBatch) -> list[Tensor]:
    """Returns the logits of each row, without padding."""
    found = net(
        batch.text_BL,
        batch.text_lens_B,
        batch.speech_BN,
        batch.speaker_BE,
        batch.gather_index_BT,
        batch.lens_B,
        batch.label_positions_BA,
    )
    return [row[:count] for row, count in zip(found, batch.label_lens_B.tolist(), strict=True)]


@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(net, batch, family):
    for index, (row, wanted) in enumerate(zip(rows(family), logits(net, batch), strict=True)):
        assert_close(logits(net, collate(family, [(index, row)]))[0], wanted, rtol=0, atol=1e-9)


def test_gradients_of_a_row_alone_are_those_in_a_batch(net, batch, family):
    logits(net, batch)[0].square().sum().backward()
    together = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    logits(net, collate(family, [(0, rows(family)[0])]))[0].square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, together[name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padded_ids_change_nothing(net, batch):
    wanted = logits(net, batch)
    speech_lens = (
        batch.gather_index_BT.ge(batch.text_BL.size(1))
        .logical_and(batch.gather_index_BT < batch.text_BL.size(1) + batch.speech_BN.size(1))
        .sum(1)
    )
    text, speech = batch.text_BL.clone(), batch.speech_BN.clone()
    for row in range(3):
        text[row, batch.text_lens_B[row] :] = (text[row, batch.text_lens_B[row] :] + 1) % TEXTS
        speech[row, speech_lens[row] :] = (speech[row, speech_lens[row] :] + 1) % SPEECHES
    assert not torch.equal(text, batch.text_BL) and not torch.equal(speech, batch.speech_BN)
    other = type(batch)(**{**vars(batch), "text_BL": text, "speech_BN": speech})
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(logits(net, other), wanted, strict=True)
    )


@torch.no_grad()
def test_logits_depend_on_earlier_positions_alone(net, batch):
    """Another speech token changes the logits from its position on, and none before it."""
    wanted, texts = logits(net, batch)[1], batch.text_BL.size(1)
    for token in (0, 5, 13):
        speech = batch.speech_BN.clone()
        speech[1, token] = (speech[1, token] + 1) % SPEECHES
        found = logits(net, type(batch)(**{**vars(batch), "speech_BN": speech}))[1]
        place = int((batch.gather_index_BT[1] == texts + token).nonzero()[0])
        behind = batch.label_positions_BA[1, : len(found)] >= place
        assert torch.equal(found[~behind], wanted[~behind])
        assert (found[behind] != wanted[behind]).any(-1).all()


@torch.no_grad()
def test_teacher_forcing_is_decoding_with_the_cache(net, family):
    """The last row has too little speech for blocks: text, task, speech."""
    row = rows(family)[2]
    text = torch.from_numpy(
        np.concatenate([row[name] for name in ("instruct", "text") if name in row], axis=1)
    )
    x = net.prompt(text, torch.from_numpy(row["speaker"].T))
    logp, cache = net.decode(x, net.empty_cache(x))
    found = [logp]
    for token in row["speech"][0]:
        logp, cache = net.decode(net.speech_embedding(torch.tensor([[token]])), cache)
        found.append(logp)
    wanted = logits(net, collate(family, [(2, row)]))[0].log_softmax(-1)
    assert_close(torch.cat(found).double(), wanted, rtol=0, atol=1e-5)
    assert cache.size(3) == x.size(1) + row["speech"].shape[1]


@torch.no_grad()
def test_the_first_logits_depend_on_all_of_the_prompt(net, batch, family):
    wanted = torch.stack([row[-1] for row in logits(net, batch)])
    text = batch.text_BL.clone()
    text[:, 0] = (text[:, 0] + 1) % TEXTS
    other = type(batch)(**{**vars(batch), "text_BL": text})
    assert (torch.stack([row[-1] for row in logits(net, other)]) != wanted).any(-1).all()
    swapped = type(batch)(**{**vars(batch), "speaker_BE": batch.speaker_BE.flip(0)})
    changed = (torch.stack([row[-1] for row in logits(net, swapped)]) != wanted).any(-1)
    assert changed.tolist() == ([True, False, True] if family == "cosyvoice" else [False] * 3)


# layouts


def laid_out(
    layout: Layout, text: int, speech: int, lead: int = 0, blocks: bool = False
) -> tuple[list[str], dict[int, int]]:
    """Returns the layout of a row as names, and its labels by position.

    The names are t for text, i for the instruction, s0, s1 ... for speech, and special tokens.
    """
    found = layout(lead + text, np.arange(speech), lead, blocks, (lead + text, speech))
    names = (
        ["i"] * lead
        + ["t"] * text
        + [f"s{i}" for i in range(speech)]
        + ["start", "task", "speaker"]
    )
    answers = dict(zip(found.label_positions_A.tolist(), found.labels_A.tolist(), strict=True))
    return [names[i] for i in found.gather_index_T], answers


def test_one_stream_of_text_then_speech():
    order, answers = laid_out(LAYOUTS["cosyvoice"], 2, 3)
    assert order == ["start", "speaker", "t", "t", "task", "s0", "s1", "s2"]
    assert answers == {4: 0, 5: 1, 6: 2, 7: SPEECHES}
    order, answers = laid_out(LAYOUTS["cosyvoice3"], 1, 1, lead=2)
    assert order == ["start", "i", "i", "t", "task", "s0"]
    assert answers == {4: 0, 5: SPEECHES + 1}


def test_blocks_of_text_and_speech():
    order, answers = laid_out(LAYOUTS["cosyvoice2"], 5, 8, lead=1, blocks=True)
    block = ["t", "t", "s0", "s1", "s2", "t", "t", "s3", "s4", "s5"]
    assert order == ["start", "i", *block, "t", "task", "s6", "s7"]
    fill, end = SPEECHES + 2, SPEECHES
    assert answers == {
        3: 0,
        4: 1,
        5: 2,
        6: fill,
        8: 3,
        9: 4,
        10: 5,
        11: fill,
        13: 6,
        14: 7,
        15: end,
    }


def test_a_row_is_in_blocks_by_its_coin_and_only_with_speech_enough():
    layout = LAYOUTS["cosyvoice3"]
    assert layout.in_blocks(4, 7, 0.49) and not layout.in_blocks(4, 7, 0.5)
    assert not layout.in_blocks(4, 6, 0.0)
    assert not LAYOUTS["cosyvoice"].in_blocks(1, 100, 0.0)


def test_about_half_of_the_rows_are_in_blocks_and_always_the_same():
    row = rows("cosyvoice3")[1]
    answers = [
        [
            int(collator("cosyvoice3").collate([str(i)], [row], Draws(seed, 0)).label_lens_B)
            for i in range(200)
        ]
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert 70 < answers[0].count(14 + 1) < 130


# decoding


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES[1:], indirect=True)
def test_special_tokens_end_the_speech_but_not_too_early(net):
    start = net.prompt(torch.tensor([[1, 2, 3]]))
    step = lambda token, cache: net.decode(net.speech_embedding(token).unsqueeze(1), cache)  # noqa: E731
    for special in range(SPEECHES, net.speech_embedding.num_embeddings):
        seen: list[Tensor] = []

        def choose(logp_V, history, special=special, seen=seen):
            seen.append(logp_V[SPEECHES:].isfinite())
            return special if seen[-1].all() else 7

        limits: dict[str, Any] = {"min_tokens": 3, "max_tokens": 9}
        logp, cache = net.decode(start, net.empty_cache(start))
        found = decode(logp, cache, step, choose, speech_vocabulary=SPEECHES, **limits)
        assert list(found) == [7] * 3
        assert [bool(finite.any()) for finite in seen] == [False] * 3 + [True]


@torch.no_grad()
def test_decoding_in_blocks_has_the_layout_of_training():
    """The generated tokens, as a training row in blocks, have the same log-probabilities."""
    net, layout, seen = network("cosyvoice2"), LAYOUTS["cosyvoice2"], list[Tensor]()

    def choose(logp_V, history):
        seen.append(logp_V)
        return SPEECHES if len(history) == 10 else len(history)

    text = torch.arange(1, 6).unsqueeze(0)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    options: dict[str, Any] = {
        "speech_vocabulary": SPEECHES,
        "fill_token": SPEECHES + 2,
        "prompt_text_1L": nothing,
        "prompt_speech_1N": nothing,
    }
    tokens = list(
        decode_in_blocks(
            net, text.split(1, dim=1), choose, max_tokens=50, block=layout.block, **options
        )
    )
    assert tokens == [0, 1, 2, 4, 5, 6, 8, 9]  # a fill takes a place in the history too
    row = {"text": text.numpy(), "speech": np.array([tokens]), "speaker": np.zeros((SPEAKER, 1))}
    batch = collate("cosyvoice2", [(0, row)])
    wanted = logits(net, batch)[0].log_softmax(-1)
    chosen = batch.labels_BA[0] != SPEECHES + 2  # a fill was due, not chosen
    assert chosen.sum() == len(seen) == 9
    for found, row in zip(seen, wanted[chosen], strict=True):
        assert_close(found[found.isfinite()].double(), row[found.isfinite()], rtol=0, atol=1e-5)


# encoders


@pytest.mark.parametrize("layer", ["conformer", "transformer"])
@torch.no_grad()
def test_a_causal_encoder_can_be_extended_in_pieces(layer):
    torch.manual_seed(0)
    net, x = encoder(5, layer).double().eval(), torch.randn(2, 9, 5, dtype=torch.float64)
    whole, cache, pieces = net(x, torch.tensor([9, 9])), net.empty_cache(x), []
    for piece in x.split([4, 1, 3, 1], dim=1):
        encoded, cache = net.extend(piece, cache)
        pieces.append(encoded)
    assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [0, 1, 3])
@torch.no_grad()
def test_an_encoder_s_rows_do_not_see_padding(chunk):
    torch.manual_seed(0)
    net, x = (
        encoder(5, "conformer", chunk).double().eval(),
        torch.randn(2, 8, 5, dtype=torch.float64),
    )
    together = net(x, torch.tensor([8, 5]))
    assert_close(net(x[1:, :5], torch.tensor([5]))[0], together[1, :5], rtol=0, atol=1e-12)


def test_chunks_see_themselves_and_what_came_before():
    like = torch.zeros(1)
    assert torch.equal(chunk_mask(4, 4, 1, like), torch.ones(4, 4).tril().bool())
    assert chunk_mask(3, 5, 0, like).all()
    assert chunk_mask(5, 5, 2, like).int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [
        [1, 1, 1, 1, 0]
    ] * 2 + [[1] * 5]
    assert torch.equal(chunk_mask(2, 5, 2, like), chunk_mask(5, 5, 2, like)[3:])


@pytest.mark.parametrize(
    ("queries", "keys", "nearest"), [(4, 4, -3), (4, 4, 0), (1, 5, 0), (2, 6, -1), (3, 7, 0)]
)
def test_scores_by_distance_become_scores_by_key(queries, keys, nearest):
    distances = list(range(keys - 1, nearest - 1, -1))
    scores = torch.randn(2, 3, queries, len(distances))
    found = by_key(scores, keys)
    for i in range(queries):
        for j in range(keys):
            distance = keys - queries + i - j
            if distance >= nearest:
                assert torch.equal(found[:, :, i, j], scores[:, :, i, distances.index(distance)]), (
                    i,
                    j,
                )


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match="width=15 must be a multiple of heads=2"):
        Encoder(4, width=15, heads=2, hidden=4, blocks=1)


# sampling


@pytest.fixture
def draw() -> Callable[[Tensor], int]:
    """Draws from probabilities."""
    return drawn_from(torch.Generator().manual_seed(0))


@pytest.fixture
def logp() -> Tensor:
    """Log-probabilities of seven tokens."""
    return torch.tensor([0.05, 0.4, 0.02, 0.3, 0.1, 0.08, 0.05]).log()


def shares(choose: Callable[[], int], logp: Tensor, count: int = 3000) -> Tensor:
    """Returns how often each token is drawn, as a share."""
    drawn = torch.tensor([choose() for _ in range(count)])
    return torch.bincount(drawn, minlength=len(logp)) / count


def test_greedy_takes_the_most_likely(logp, draw):
    assert greedy(logp, [1, 1, 1], draw) == 1


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_nucleus_of_one_is_greedy(logp, draw, choice):
    assert {nucleus(logp, [], draw, **choice) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 0.72}, {1, 3, 4}),
        ({"top_p": 1.0, "top_k": 4}, {1, 3, 4, 5}),
        ({"top_p": 1.0}, set(range(7))),
    ],
)
def test_a_nucleus_is_never_left_and_keeps_its_proportions(logp, draw, choice, kept):
    found = shares(lambda: nucleus(logp, [], draw, **choice), logp)
    wanted = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(logp.exp().tolist())])
    assert set(found.nonzero().flatten().tolist()) == kept
    assert_close(found, wanted / wanted.sum(), rtol=0, atol=0.04)


def test_unnormalised_scores_are_sampled_alike(logp, draw):
    assert shares(lambda: nucleus(logp + 5, [], draw, top_p=0.65), logp)[[1, 3]].sum() == 1


def test_a_token_that_is_repeated_is_drawn_again(logp, draw):
    assert {ras(logp, [0, 2, 4], draw, top_k=1) for _ in range(50)} == {1}
    found = shares(lambda: ras(logp, [1, 2, 4], draw, top_k=1), logp)
    wanted = logp.exp().scatter(0, torch.tensor(1), 0)
    assert found[1] == 0
    assert_close(found, wanted / wanted.sum(), rtol=0, atol=0.04)


def test_only_the_window_counts_as_repetition(logp, draw):
    options: dict[str, Any] = {"top_k": 1, "window": 4, "repetition": 0.5}
    assert ras(logp, [1, 1, 1, 0, 0, 0, 0], draw, **options) == 1
    assert ras(logp, [0, 0, 0, 1], draw, **options) == 1
    assert ras(logp, [0, 1, 0, 1], draw, **options) != 1


def test_a_seed_makes_sampling_repeatable(logp):
    runs = [
        [ras(logp, [], drawn) for _ in range(30)]
        for drawn in (drawn_from(torch.Generator().manual_seed(3)) for _ in range(2))
    ]
    assert runs[0] == runs[1] and len(set(runs[0])) > 1


# pretrained weights


def test_a_pretrained_backbone_is_taken_over_whole_or_not_at_all(tmp_path):
    source, net = network("cosyvoice3").float(), network("cosyvoice2").float()
    source.llm.model.save_pretrained(tmp_path / "qwen")
    before = {
        name: tensor.clone()
        for name, tensor in net.state_dict().items()
        if not name.startswith("llm.")
    }
    with torch.no_grad():
        for parameter in net.llm.parameters():
            parameter.zero_()
    net.load_pretrained(tmp_path / "qwen")
    for name, tensor in source.llm.state_dict().items():
        assert torch.equal(net.llm.state_dict()[name], tensor), name
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    other: dict[str, Any] = {
        "special_tokens": 3,
        "sos_task_ids": None,
        "bias": True,
        "width": 16,
        "layers": 3,
        "heads": 4,
        "key_heads": 2,
        "hidden": 24,
    }
    with pytest.raises(ValueError, match="names or shapes of its weights"):
        QwenLM(text_vocabulary=TEXTS, speech_vocabulary=SPEECHES, **other).load_pretrained(
            tmp_path / "qwen"
        )
    with pytest.raises((OSError, ValueError)):
        net.load_pretrained(tmp_path / "nothing")
