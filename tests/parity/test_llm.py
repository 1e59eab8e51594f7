"""The language models give the numbers of the original, in every recording that is there."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosyexp.data.collators.llm import LanguageBatch, LanguageCollator
from cosyexp.data.draws import Draws
from cosyexp.data.layout import Layout
from cosyexp.data.tokenizers import CharacterTokenizer
from cosyexp.models.llm.decoding import decode, decode_in_blocks
from cosyexp.models.llm.qwen_lm import QwenLM
from cosyexp.models.llm.sampling import greedy, ras
from cosyexp.models.llm.transformer_lm import TransformerLM
from cosyexp.objectives.language import Language
from cosyexp.objectives.losses import preference
from tests.parity.conftest import encoder

Numbers = dict[str, Any]  # a recording of the original
QWEN = ["llm_v2", "llm_v3"]


def transformer(given: Numbers) -> TransformerLM:
    return TransformerLM(
        text_vocabulary=given["text_token_size"],
        speech_vocabulary=given["speech_token_size"],
        text_width=given["text_encoder_input_size"],
        speaker_dim=given["spk_embed_dim"],
        text_encoder=encoder(given["text_encoder"], "conformer"),
        llm=encoder(given["llm"], "transformer"),
    )


def qwen(given: Numbers, weights: Mapping[str, Tensor]) -> QwenLM:
    sizes, classes = given["qwen"], len(weights["llm_decoder.weight"])
    return QwenLM(
        text_vocabulary=sizes["vocab_size"],
        speech_vocabulary=given["speech_token_size"],
        special_tokens=classes - given["speech_token_size"],
        sos_task_ids=None if "llm_embedding.weight" in weights else (0, 2),
        bias="llm_decoder.bias" in weights,
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        key_heads=sizes["num_key_value_heads"],
        hidden=sizes["intermediate_size"],
        positions=sizes["max_position_embeddings"],
        theta=sizes["rope_theta"],
    )


def network(numbers: Numbers) -> Any:
    """Builds the network with the weights of the original."""
    given, weights = numbers["config"], numbers["state_dict"]
    net = qwen(given, weights) if "qwen" in given else transformer(given)
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights)
    return net.eval()


def layout(numbers: Numbers) -> Layout:
    given, weights = numbers["config"], numbers["state_dict"]
    vocabulary = given["speech_token_size"]
    if "qwen" not in given:
        return Layout(speaker=True, vocabulary=vocabulary)
    end, fill = (0, 2) if "llm_embedding.weight" in weights else (1, 3)
    return Layout(
        speaker=False,
        vocabulary=vocabulary,
        eos=end,
        fill_token=fill,
        interleaved=0.5,
        block=tuple(given["mix_ratio"]),
    )


class RecordedDraws(Draws):
    """Returns the recorded random number of each utterance, in place of a generator's."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = values

    def __call__(self, utt: str, purpose: str) -> Any:
        return SimpleNamespace(random=lambda: np.float64(self.values[utt]))


FIELDS = {"text": "text_token", "speech": "speech_token", "instruct": "instruct_token"}


def batch_of(numbers: Numbers, given: Numbers, coins: Sequence[float] = ()) -> LanguageBatch:
    """Collates the original's tokens.

    Args:
        numbers: the recording, for its config.
        given: the batch.
        coins: the random numbers by which the original chose the layout of each row.
    """
    collator = LanguageCollator(
        tokenizer=CharacterTokenizer(alphabet="a"),
        speech_vocabulary=numbers["config"]["speech_token_size"],
        speaker_dim=given["embedding"].size(1),
        use_spk_embedding=False,
        layout=layout(numbers),
    )
    rows: list[dict[str, np.ndarray]] = []
    for row in range(len(given["text_token"])):
        content = {
            field: given[name][row : row + 1, : given[f"{name}_len"][row]].numpy()
            for field, name in FIELDS.items()
            if name in given
        }
        rows.append({**content, "speaker": given["embedding"][row].unsqueeze(1).numpy()})
    draws = {str(row): coins[row] if coins else 1.0 for row in range(len(rows))}
    return collator.collate(list(draws), rows, RecordedDraws(draws))


def recorded(name: str, prefix: str) -> list[Any]:
    """Returns the recorded steps of a fixture, of any seed; one to skip if it does not exist."""
    path = Path(os.environ.get("COSYEXP_PARITY", "nowhere")) / name / "fixture.pt"
    keys = torch.load(path, weights_only=True) if path.exists() else {prefix: None}
    return [pytest.param(name, key, id=f"{name}-{key}") for key in keys if key.startswith(prefix)]


STEPS = [
    step
    for name in ("llm_v1", *QWEN)
    for prefix in ("train", "eval")
    for step in recorded(name, prefix)
]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_loss_accuracy_and_gradients(fixture, close, name, step):
    numbers = fixture(name)
    wanted = numbers[step]
    net, given = network(numbers), numbers["config"]
    batch = batch_of(numbers, numbers["batch"], [coin for _, coin in wanted["tape"]])
    objective = Language(net, optimizer=None, scheduler=None, smoothing=given["lsm_weight"])
    loss = next(objective.losses(batch))
    tokens = objective.count_units(batch)["tokens"]
    total = loss.scaled({"tokens": tokens if given["length_normalized_loss"] else len(batch)})
    total.backward()
    close("loss", total, wanted["out"]["loss"])
    close("accuracy", loss["acc"].sum / tokens, wanted["out"]["acc"])
    for key, norm in wanted.get("grad_norm", {}).items():
        close(f"norm of {key}", net.get_parameter(key).grad.norm(), norm)
    for key, grad in wanted.get("grads", {}).items():
        torch.testing.assert_close(net.get_parameter(key).grad, grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "step"), [step for name in QWEN for step in recorded(name, "train")]
)
def test_sequence_and_logits(fixture, close, name, step):
    numbers = fixture(name)
    captured = numbers[step]["captured"]
    net = network(numbers)
    batch = batch_of(numbers, numbers["batch"], [coin for _, coin in numbers[step]["tape"]])
    found = net(
        batch.text_BL,
        batch.text_lens_B,
        batch.speech_BN,
        batch.speaker_BE,
        batch.gather_index_BT,
        batch.lens_B,
        batch.label_positions_BA,
    )
    assert torch.equal(batch.lens_B, captured["lm_input_len"].long())
    for row, count in enumerate(batch.label_lens_B):
        positions = batch.label_positions_BA[row, :count]
        assert torch.equal(batch.labels_BA[row, :count], captured["lm_target"][row][positions])
        assert (captured["lm_target"][row] != -1).sum() == count
        close(f"logits of row {row}", found[row, :count], captured["logits"][row][positions])


@torch.no_grad()
def test_intermediates_of_v1(fixture, close):
    numbers = fixture("llm_v1")
    net, batch = network(numbers), batch_of(numbers, numbers["batch"])
    captured = numbers["captured"]
    found = net(
        batch.text_BL,
        batch.text_lens_B,
        batch.speech_BN,
        batch.speaker_BE,
        batch.gather_index_BT,
        batch.lens_B,
        batch.label_positions_BA,
    )
    text = net.text_encoder(net.text_embedding(batch.text_BL), batch.text_lens_B)
    for row, (size, whole) in enumerate(zip(batch.text_lens_B, batch.lens_B, strict=True)):
        close(f"text encoder, row {row}", text[row, :size], captured["text_encoder"][0][row, :size])
        positions = batch.label_positions_BA[row, : batch.label_lens_B[row]]
        close(
            f"logits, row {row}", found[row, : len(positions)], captured["logits"][row, positions]
        )
        assert whole == captured["llm_in"][1][row]


def test_label_smoothing(fixture, close):
    numbers = fixture("llm_v1")
    batch = batch_of(numbers, numbers["batch"])
    for name, wanted in numbers["loss_variants"].items():
        smoothing, normalised = name.removeprefix("lsm").split("_norm")
        objective = Language(
            network(numbers), optimizer=None, scheduler=None, smoothing=float(smoothing)
        )
        share = objective.count_units(batch)["tokens"] if normalised == "True" else len(batch)
        close(name, objective.validate(batch)["ce"].sum / share, wanted)


SHORTEST, LONGEST = 2, 6  # speech tokens per text token, with which v1 was recorded


def prompt_of(net: Any, numbers: Numbers, mode: str) -> tuple[Tensor, int, int]:
    """Returns the embedded prompt, and the fewest and most speech tokens of the original."""
    given = numbers["inference_input"] if "inference_input" in numbers else numbers[mode]
    if "min_len" in given:
        x = torch.cat(
            [net.prompt(given["text"]), net.speech_embedding(given["prompt_speech"])], dim=1
        )
        return x, given["min_len"], given["max_len"]
    size = given["text"].size(1)
    if mode == "inference_noprompt":
        return net.prompt(given["text"], None), SHORTEST * size, LONGEST * size
    text = torch.cat([given["prompt_text"], given["text"]], dim=1)
    x = torch.cat(
        [net.prompt(text, given["embedding"]), net.speech_embedding(given["prompt_speech_token"])],
        dim=1,
    )
    return x, SHORTEST * size, LONGEST * size


MODES = [(name, f"inference_{mode}") for name in ("llm_v1", *QWEN) for mode in ("greedy", "ras")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "mode"), [*MODES, ("llm_v1", "inference_noprompt")])
def test_decoding_with_the_cache(fixture, close, name, mode):
    numbers = fixture(name)
    net, wanted = network(numbers), numbers[mode]
    vocabulary = numbers["config"]["speech_token_size"]
    drawn = [int(value) for _, value in wanted.get("tape", [])]
    seen: list[Tensor] = []

    def choose(logp_V: Tensor, history: Sequence[int]) -> int:
        seen.append(logp_V)
        sampler = ras if mode == "inference_ras" else greedy
        return sampler(logp_V, history, lambda _: drawn.pop(0))

    def step(token: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        logp, grown = net.decode(net.speech_embedding(token).unsqueeze(1), cache)
        return logp, grown

    x, min_tokens, max_tokens = prompt_of(net, numbers, mode)
    logp, cache = net.decode(x, net.empty_cache(x))
    tokens = decode(
        logp,
        cache,
        step,
        choose,
        speech_vocabulary=vocabulary,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        forbidden=[vocabulary],  # the original forbids only this class
    )
    assert list(tokens) == wanted["tokens"]
    assert not drawn
    if "logp" in wanted:
        found, finite = torch.stack(seen), wanted["logp"].isfinite()
        assert torch.equal(found.isfinite(), finite)
        close("log-probabilities", found[finite], wanted["logp"][finite])


@torch.no_grad()
def test_decoding_while_the_text_comes(fixture, close):
    numbers = fixture("llm_v2")
    net, given = network(numbers), numbers["inference_bistream"]
    vocabulary = numbers["config"]["speech_token_size"]
    enough = int(re.findall(r"len\(decoded\)\s*>=\s*(\d+)", given["sampler"])[0])
    seen: list[Tensor] = []

    def choose(logp_V: Tensor, history: Sequence[int]) -> int:
        seen.append(logp_V)
        return vocabulary if len(history) >= enough else int(logp_V[:vocabulary].argmax())

    tokens = decode_in_blocks(
        net,
        given["chunks"],
        choose,
        speech_vocabulary=vocabulary,
        fill_token=vocabulary + 2,
        prompt_text_1L=given["prompt_text"],
        prompt_speech_1N=given["prompt_speech"],
        max_tokens=1000,
        block=tuple(numbers["config"]["mix_ratio"]),
        stutter=True,
    )
    assert list(tokens) == given["tokens"]
    for step, (found, wanted) in enumerate(zip(seen, given["logp"], strict=True)):
        finite = found.isfinite()
        close(f"step {step}", found[finite], wanted[finite])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "step"), recorded("llm_v2", "dpo_train") + recorded("llm_v2", "dpo_step")
)
def test_the_supervised_part_of_a_preference(fixture, close, name, step):
    """The original draws a layout for each answer, and this one of its two losses is correct."""
    numbers = fixture(name)
    given, recording = numbers["dpo_batch"], numbers[step]
    wanted = recording.get("policy") or recording["out"]
    coins = [coin for _, coin in recording["tape"]][: len(given["text_token"])]
    net, batch = network(numbers), batch_of(numbers, given, coins)
    objective = Language(
        net, optimizer=None, scheduler=None, smoothing=numbers["config"]["lsm_weight"]
    )
    loss, tokens = objective.validate(batch), objective.count_units(batch)["tokens"]
    close("loss", loss["ce"].sum / tokens, wanted["loss"])
    close("accuracy", loss["acc"].sum / tokens, wanted["acc"])


@pytest.mark.parametrize(("name", "step"), recorded("llm_v2", "dpo_step"))
def test_the_formulas_of_a_preference_step(fixture, close, name, step):
    """Loss, rewards and accuracy from the original's log-probabilities.

    The original takes these at the wrong positions, so they are given here.
    """
    numbers, beta = fixture(name)[step], 0.01
    chosen, rejected = (
        numbers["policy"][side] - numbers["ref"][side]
        for side in ("chosen_logps", "rejected_logps")
    )
    loss = preference.dpo(chosen - rejected, beta).mean()
    close("preference", loss, numbers["preference_loss"])
    close("loss", loss + numbers["policy"]["loss"], numbers["loss"])
    close("chosen reward", beta * chosen, numbers["chosen_reward"])
    close("rejected reward", beta * rejected, numbers["reject_reward"])
    close("accuracy", preference.wins(beta * (chosen - rejected)).mean(), numbers["dpo_acc"])
