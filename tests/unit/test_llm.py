"""The speech-token language model, its encoders, and sampling."""

import pytest
import torch
from torch.testing import assert_close

from cosyexp.models.layers.attention import by_key
from cosyexp.models.layers.encoder import Encoder, chunk_mask
from cosyexp.models.llm.sampling import drawn_from, greedy, nucleus, ras
from cosyexp.models.llm.transformer_lm import TransformerLM

TEXTS, SPEECHES, SPEAKER = 20, 30, 6


def encoder(in_width, layer="transformer", chunk=1, dropout=0.0):
    return Encoder(in_width, width=16, heads=2, hidden=24, blocks=2, layer=layer, chunk=chunk, dropout=dropout)


@pytest.fixture
def net():
    torch.manual_seed(0)
    parts = {"text_encoder": encoder(12, "conformer"), "llm": encoder(16)}
    net = TransformerLM(text_vocabulary=TEXTS, speech_vocabulary=SPEECHES, text_width=12, speaker_dim=SPEAKER, **parts)
    return net.double().eval()


@pytest.fixture
def batch():
    """Three rows of other lengths: text, speech, and the speaker."""
    draw = torch.Generator().manual_seed(0)
    text_lens, speech_lens = torch.tensor([5, 3, 7]), torch.tensor([4, 9, 1])
    text, speech = torch.randint(TEXTS, (3, 7), generator=draw), torch.randint(SPEECHES, (3, 9), generator=draw)
    return text, text_lens, speech, speech_lens, torch.randn(3, SPEAKER, generator=draw, dtype=torch.float64)


def answers(logits, speech_lens):
    """What is meaningful of each row."""
    return [row[: int(count) + 1] for row, count in zip(logits, speech_lens, strict=True)]


def row_alone(batch, row):
    text, text_lens, speech, speech_lens, speaker = (x[row : row + 1] for x in batch)
    return text[:, : int(text_lens)], text_lens, speech[:, : int(speech_lens)], speech_lens, speaker


@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(net, batch):
    together = answers(net(*batch), batch[3])
    for row, wanted in enumerate(together):
        assert_close(net(*row_alone(batch, row))[0], wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_teacher_forcing_is_decoding_with_the_cache(net, batch):
    for row, wanted in enumerate(answers(net(*batch), batch[3])):
        text, text_lens, speech, _, speaker = row_alone(batch, row)
        x = net.prefix(text, text_lens, speaker)
        logp, cache = net.decode(x, net.llm.empty_cache(x))
        found = [logp]
        for token in speech[0]:
            logp, cache = net.decode(net.speech_embedding(token[None, None]), cache)
            found.append(logp)
        assert_close(torch.cat(found).double(), wanted.log_softmax(-1), rtol=0, atol=1e-5)
        assert cache.size(3) == text.size(1) + speech.size(1) + 3


@torch.no_grad()
def test_padded_ids_change_nothing(net, batch):
    text, text_lens, speech, speech_lens, speaker = batch
    other_text, other_speech = text.clone(), speech.clone()
    for row in range(3):
        other_text[row, text_lens[row] :] = (text[row, text_lens[row] :] + 1) % TEXTS
        other_speech[row, speech_lens[row] :] = (speech[row, speech_lens[row] :] + 1) % SPEECHES
    assert not torch.equal(other_text, text) and not torch.equal(other_speech, speech)
    wanted = answers(net(*batch), speech_lens)
    for ours, theirs in zip(answers(net(other_text, text_lens, other_speech, speech_lens, speaker), speech_lens), wanted, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 4, 8])
def test_a_speech_token_is_seen_only_by_those_behind_it(net, batch, place):
    text, text_lens, speech, speech_lens, speaker = row_alone(batch, 1)
    before = net(text, text_lens, speech, speech_lens, speaker)
    speech = speech.clone()
    speech[0, place] = (speech[0, place] + 1) % SPEECHES
    after = net(text, text_lens, speech, speech_lens, speaker)
    assert torch.equal(after[:, : place + 1], before[:, : place + 1])
    assert (after[:, place + 1 :] != before[:, place + 1 :]).any(-1).all()


@torch.no_grad()
def test_the_answer_depends_on_text_and_speaker(net, batch):
    text, text_lens, speech, speech_lens, speaker = batch
    before = net(*batch)
    other = text.clone()
    other[:, 0] = (text[:, 0] + 1) % TEXTS
    assert (net(other, text_lens, speech, speech_lens, speaker) != before).any(-1).all()
    assert (net(text, text_lens, speech, speech_lens, speaker.flip(0)) != before).any(-1)[[0, 2]].all()


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
    net, x = encoder(5, "conformer", chunk).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64)
    together = net(x, torch.tensor([8, 5]))
    assert_close(net(x[1:, :5], torch.tensor([5]))[0], together[1, :5], rtol=0, atol=1e-12)


def test_chunks_see_themselves_and_what_came_before():
    like = torch.zeros(1)
    assert torch.equal(chunk_mask(4, 4, 1, like), torch.ones(4, 4).tril().bool())
    assert chunk_mask(3, 5, 0, like).all()
    assert chunk_mask(5, 5, 2, like).int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0]] * 2 + [[1] * 5]
    assert torch.equal(chunk_mask(2, 5, 2, like), chunk_mask(5, 5, 2, like)[3:])


@pytest.mark.parametrize(("queries", "keys", "nearest"), [(4, 4, -3), (4, 4, 0), (1, 5, 0), (2, 6, -1), (3, 7, 0)])
def test_scores_by_distance_become_scores_by_key(queries, keys, nearest):
    distances = list(range(keys - 1, nearest - 1, -1))
    scores = torch.randn(2, 3, queries, len(distances))
    found = by_key(scores, keys)
    for i in range(queries):
        for j in range(keys):
            distance = keys - queries + i - j
            if distance >= nearest:
                assert torch.equal(found[:, :, i, j], scores[:, :, i, distances.index(distance)]), (i, j)


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match="a width of 15 does not divide into 2 heads"):
        Encoder(4, width=15, heads=2, hidden=4, blocks=1)


# sampling


@pytest.fixture
def draw():
    return drawn_from(torch.Generator().manual_seed(0))


@pytest.fixture
def logp():
    return torch.tensor([0.05, 0.4, 0.02, 0.3, 0.1, 0.08, 0.05]).log()


def shares(choose, logp, count=3000):
    drawn = torch.tensor([choose() for _ in range(count)])
    return torch.bincount(drawn, minlength=len(logp)) / count


def test_greedy_takes_the_most_likely(logp, draw):
    assert greedy(logp, [1, 1, 1], draw) == 1


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_nucleus_of_one_is_greedy(logp, draw, choice):
    assert {nucleus(logp, [], draw, **choice) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("choice", "kept"),
    [({"top_p": 0.65}, {1, 3}), ({"top_p": 0.72}, {1, 3, 4}), ({"top_p": 1.0, "top_k": 4}, {1, 3, 4, 5}), ({"top_p": 1.0}, set(range(7)))],
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
    options = {"top_k": 1, "window": 4, "repetition": 0.5}
    assert ras(logp, [1, 1, 1, 0, 0, 0, 0], draw, **options) == 1
    assert ras(logp, [0, 0, 0, 1], draw, **options) == 1
    assert ras(logp, [0, 1, 0, 1], draw, **options) != 1


def test_a_seed_makes_sampling_repeatable(logp):
    runs = [[ras(logp, [], drawn) for _ in range(30)] for drawn in (drawn_from(torch.Generator().manual_seed(3)) for _ in range(2))]
    assert runs[0] == runs[1] and len(set(runs[0])) > 1
