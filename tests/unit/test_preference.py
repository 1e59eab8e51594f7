"""Preference pairs: losses, layout, and the objective."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from cosyexp.data.collators.preference import PreferenceBatch, PreferenceCollator
from cosyexp.data.draws import Draws
from cosyexp.data.tokenizers import CharacterTokenizer
from cosyexp.objectives.losses import preference
from cosyexp.objectives.preference import Preference
from tests.unit.test_llm import FAMILIES, LAYOUTS, SPEAKER, SPEECHES, TEXTS, Row, network

H = torch.tensor([-3.0, -0.5, 0.0, 0.2, 4.0], dtype=torch.float64)


# losses


def test_each_loss_has_its_formula():
    """The equation of each paper, written out."""
    beta, probability = 0.3, lambda x: 1 / (1 + math.exp(-x))
    for h, dpo, cdpo, ipo, hinge, simpo in zip(
        H.tolist(),
        preference.dpo(H, beta),
        preference.dpo(H, beta, 0.1),
        preference.ipo(H, beta),
        preference.hinge(H, beta),
        preference.simpo(H, beta, 0.5),
        strict=True,
    ):
        assert dpo.item() == pytest.approx(-math.log(probability(beta * h)))
        assert cdpo.item() == pytest.approx(
            -0.9 * math.log(probability(beta * h)) - 0.1 * math.log(probability(-beta * h))
        )
        assert ipo.item() == pytest.approx((h - 1 / 0.6) ** 2)
        assert hinge.item() == pytest.approx(max(0.0, 1 - beta * h))
        assert simpo.item() == pytest.approx(-math.log(probability(beta * h - 0.5)))


@pytest.mark.parametrize("loss", [preference.dpo, preference.ipo, preference.hinge])
def test_gradients_are_those_of_the_formulas(loss):
    assert torch.autograd.gradcheck(lambda h: loss(h, 0.3), H.clone().requires_grad_())


def test_a_tie_counts_one_half():
    assert preference.wins(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


# pairs


def rows(family: str) -> list[Row]:
    """Returns three pairs of different lengths; the last has too little speech for blocks."""
    draw = np.random.default_rng(0)
    found = []
    for text, speech, rejected in ((4, 9, 12), (3, 14, 7), (6, 15, 3)):
        row = {
            "text": draw.integers(TEXTS, size=(1, text)),
            "speaker": draw.standard_normal((SPEAKER, 1)),
        }
        row |= {
            "speech": draw.integers(SPEECHES, size=(1, speech)),
            "rejected": draw.integers(SPEECHES, size=(1, rejected)),
        }
        found.append(
            row
            | ({"instruct": draw.integers(TEXTS, size=(1, 2))} if family == "cosyvoice3" else {})
        )
    return found


def collator(family: str, keep_layout: bool = False) -> PreferenceCollator:
    """Returns the collator of pairs of a family."""
    options: dict[str, Any] = {
        "speech_vocabulary": SPEECHES,
        "speaker_dim": SPEAKER,
        "use_spk_embedding": False,
        "layout": LAYOUTS[family],
    }
    return PreferenceCollator(
        tokenizer=CharacterTokenizer(alphabet="a"), keep_layout=keep_layout, **options
    )


def collate(
    family: str,
    chosen: Sequence[tuple[int, Row]] | None = None,
    epoch: int = 0,
    keep_layout: bool = False,
) -> PreferenceBatch:
    """Returns a batch of numbered pairs; by default, of all."""
    chosen = list(enumerate(rows(family))) if chosen is None else chosen
    return collator(family, keep_layout).collate(
        [f"utt {i}" for i, _ in chosen], [row for _, row in chosen], Draws(2, epoch)
    )


def objective(family: str, reference: Any = None, **options: Any) -> Preference:
    """Returns an objective, with a network as its reference if there is one."""
    found = Preference(network(family), optimizer=None, scheduler=None, **options)
    if reference is not None:
        found.frozen_modules = [reference]
    return found


def fills(batch: PreferenceBatch) -> list[int]:
    """Returns the number of fill tokens of each row."""
    return [
        int((batch.labels_BA[row, :count] >= SPEECHES).sum()) - 1
        for row, count in enumerate(batch.label_lens_B.tolist())
    ]


def test_both_answers_of_a_pair_have_one_layout():
    batch = collate("cosyvoice2")
    assert len(batch) == 3 and len(batch.text_BL) == 6
    assert torch.equal(batch.text_BL[:3], batch.text_BL[3:]) and torch.equal(
        batch.speaker_BE[:3], batch.speaker_BE[3:]
    )
    assert fills(batch) == [2, 1, 0, 2, 1, 0]


def test_a_layout_that_is_kept_is_the_same_in_all_epochs():
    def epochs(keep):
        return [
            [
                fills(collate("cosyvoice3", [(i, rows("cosyvoice3")[0])], epoch, keep))[0]
                for i in range(20)
            ]
            for epoch in range(3)
        ]

    kept, drawn = epochs(True), epochs(False)
    assert kept[0] == kept[1] == kept[2] and set(kept[0]) == {0, 2}
    assert drawn[0] != drawn[1]


def test_the_length_of_a_pair_counts_both_of_its_rows():
    batch = collate("cosyvoice")
    sizes = {
        name: np.array([row[name].shape[1] for row in rows("cosyvoice")])
        for name in ("text", "speech", "rejected", "speaker")
    }
    cost = collator("cosyvoice").length(sizes)
    assert cost.tolist() == [2 * (4 + 12 + 3), 2 * (3 + 14 + 3), 2 * (6 + 15 + 3)]
    assert (cost >= [int(batch.lens_B[i] + batch.lens_B[i + 3]) for i in range(3)]).all()


# the objective


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalize", ["length", "sum"])
def test_log_probabilities_are_those_of_the_answers(family, normalize):
    found = objective(family, normalize=normalize)
    net, batch = found.trainables["llm"].module, collate(family)
    logits = net(
        batch.text_BL,
        batch.text_lens_B,
        batch.speech_BN,
        batch.speaker_BE,
        batch.gather_index_BT,
        batch.lens_B,
        batch.label_positions_BA,
    )
    for row, value in enumerate(found.reference(batch, net)):
        count = int(batch.label_lens_B[row])
        each = [logits[row, i].log_softmax(-1)[batch.labels_BA[row, i]] for i in range(count)]
        assert_close(value, sum(each) / (count if normalize == "length" else 1))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_only_labels_of_the_answers_count(family):
    """Another padded token changes nothing; another answer changes its row, and no other."""
    found = objective(family)
    net, batch = found.trainables["llm"].module, collate(family)
    wanted = found.reference(batch, net)
    padded = batch.labels_BA.clone()
    for row, count in enumerate(batch.label_lens_B.tolist()):
        padded[row, count:] += 1
    assert torch.equal(
        found.reference(type(batch)(**{**vars(batch), "labels_BA": padded}), net), wanted
    )
    for row in range(6):
        target = batch.labels_BA.clone()
        target[row, 0] = (target[row, 0] + 1) % SPEECHES
        changed = (
            found.reference(type(batch)(**{**vars(batch), "labels_BA": target}), net) != wanted
        )
        assert changed.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_that_is_its_reference_has_no_reward(family):
    found = objective(family, network(family))
    loss = next(found.losses(collate(family)))
    assert loss["dpo_loss"].sum.item() == pytest.approx(3 * math.log(2), abs=1e-12)
    assert loss["chosen_reward"].sum == loss["rejected_reward"].sum == loss["margin"].sum == 0
    assert loss["accuracy"].sum == 1.5


def test_rewards_loss_and_sft_have_their_formulas():
    reference, batch = network("cosyvoice"), collate("cosyvoice")
    found = objective("cosyvoice", network("cosyvoice"), beta=0.4, sft_weight=0.7)
    with torch.no_grad():
        for parameter in found.frozen_modules[0].parameters():
            parameter.add_(0.05)
        reference.load_state_dict(found.frozen_modules[0].state_dict())
    loss, units = next(found.losses(batch)), found.count_units(batch)
    policy, against = (
        found.reference(batch, found.trainables["llm"].module),
        found.reference(batch, reference),
    )
    gain = 0.4 * (policy - against)
    assert units == {
        "pairs": 3,
        "tokens": sum(len(row["speech"][0]) + 1 for row in rows("cosyvoice")),
    }
    assert_close(loss["dpo_loss"].sum, -logsigmoid(gain[:3] - gain[3:]).sum())
    assert_close(loss["chosen_reward"].sum, gain[:3].sum())
    assert_close(loss["rejected_reward"].sum, gain[3:].sum())
    assert_close(loss["sft_loss"].sum, -(policy[:3] * batch.label_lens_B[:3]).sum())
    total = loss.scaled({name: float(count) for name, count in units.items()})
    assert_close(total, loss["dpo_loss"].sum / 3 + 0.7 * loss["sft_loss"].sum / units["tokens"])


def test_cached_log_probabilities_replace_the_reference():
    batch, net = collate("cosyvoice2"), network("cosyvoice2")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    live, cached = objective("cosyvoice2", net), objective("cosyvoice2")
    known = type(batch)(**{**vars(batch), "reference_B": live.reference(batch, net)})
    for (name, ours), theirs in zip(
        next(live.losses(batch)).items(), next(cached.losses(known)).values(), strict=True
    ):
        assert_close(ours.sum, theirs.sum, msg=name)


def test_simpo_needs_no_reference():
    found = objective("cosyvoice", loss="simpo", beta=2.0, margin=0.3)
    batch = collate("cosyvoice")
    policy = found.reference(batch, found.trainables["llm"].module)
    assert not found.needs_reference
    assert_close(
        next(found.losses(batch))["dpo_loss"].sum,
        -logsigmoid(2 * (policy[:3] - policy[3:]) - 0.3).sum(),
    )


def test_there_is_no_dropout():
    net = network("cosyvoice")
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    Preference(net, optimizer=None, scheduler=None)
    assert all(module.p == 0 for module in net.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("options", [{"loss": "nothing"}, {"normalize": "nothing"}])
def test_a_misspelled_choice_is_answered_with_the_choices(options):
    with pytest.raises(ValueError, match="nothing"):
        objective("cosyvoice", **options)


def test_gradients_of_the_objective():
    """Against differences of the loss, in fp64."""
    found, batch = objective("cosyvoice", network("cosyvoice"), beta=0.5), collate("cosyvoice")
    net: Any = found.trainables["llm"].module
    weight = net.llm_decoder.bias
    units = {name: float(count) for name, count in found.count_units(batch).items()}

    def loss():
        return next(found.losses(batch)).scaled(units)

    loss().backward()
    for place in (0, 7, SPEECHES):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[place] += step
                values.append(loss().item())
                weight[place] -= step
        assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)
