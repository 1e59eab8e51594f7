"""Exports to a Hugging Face folder: what plain transformers makes of it."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cosyexp.cli.compose import compose_train
from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.exporting.hf import HuggingFace, joined_weights, verify, vocabulary_of
from cosyexp.exporting.source import source_from_file
from cosyexp.models.llm.decoding import decode_batch
from cosyexp.models.llm.sampling import greedy
from cosyexp.registry import build
from cosyexp.run.tensors import save_tensors
from tests.support import TINY, family_words

TEXT, SPEECH, LENGTH = 151936, 6561, 12
PROMPTS = {3: 10, 8: 20, 21: 20}  # how many there are of each number of text tokens


class Exported(NamedTuple):
    """A network and the folder of its export."""

    config: TrainConfig
    network: Any
    folder: Path
    model: Any


@pytest.fixture(scope="module", params=["cosyvoice2", "cosyvoice3"])
def exported(
    request: pytest.FixtureRequest, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """A random llm of large weights, so that its answers vary."""
    folder = tmp_path_factory.mktemp(request.param)
    words = family_words(request.param, "llm")
    words.remove("tokenizer@family.tokenizer=characters")
    config = compose_train([*words, f"family.tokenizer.folder={qwen_folder}"])
    torch.manual_seed(0)
    network = build(config.network, "network")
    for name, weight in network.named_parameters():
        if name.endswith("decoder.bias") or weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    save_tensors(folder / "llm.safetensors", network.state_dict())
    source = source_from_file(config, str(folder / "llm.safetensors"))
    (path,) = HuggingFace().export(source, folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(path.parent)
    return Exported(config, network.eval().requires_grad_(False), path.parent, model)


def prompts(size: int, count: int) -> Tensor:
    return torch.randint(TEXT, (count, size), generator=torch.Generator().manual_seed(size))


@torch.inference_mode()
def ours(network: Any, text_BL: Tensor) -> list[list[int]]:
    """Greedy answers of up to LENGTH speech tokens."""
    x = network.prompt(text_BL)
    logp_BV, cache = network.decode(x, network.empty_cache(x))

    def step(token_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return network.decode(network.speech_embedding(token_B).unsqueeze(1), cache)

    answers: list[list[int]] = [[] for _ in text_BL]
    choose = [partial(greedy, draw=lambda weights: 0)] * len(text_BL)
    limits = [(0, LENGTH)] * len(text_BL)
    for tokens in decode_batch(
        logp_BV, cache, step, choose, speech_vocabulary=SPEECH, limits=limits
    ):
        for row, token in tokens.items():
            answers[row].append(token)
    return answers


def theirs(model: Any, ids_BT: Tensor, **options: Any) -> list[list[int]]:
    """The same by `generate`, up to the first token without a sound."""
    output = model.generate(ids_BT, max_new_tokens=LENGTH, **options)[:, ids_BT.size(1) :] - TEXT
    answers = []
    for row in output.tolist():
        ends = [i for i, token in enumerate(row) if token >= SPEECH]
        answers.append(row[: ends[0]] if ends else row)
    return answers


def ids_of(exported: Exported, text_BL: Tensor) -> Tensor:
    """The prompts in the exported vocabulary."""
    names: Any = AutoTokenizer.from_pretrained(exported.folder).convert_tokens_to_ids
    sos, task = (torch.full((len(text_BL), 1), names(name)) for name in ("<|sos|>", "<|task_id|>"))
    return torch.cat([sos, text_BL, task], dim=1)


def test_plain_transformers_answers_as_we_do(exported):
    assert type(exported.model).__name__ == "Qwen2ForCausalLM"
    answers = []
    for size, count in PROMPTS.items():
        text_BL = prompts(size, count)
        wanted = ours(exported.network, text_BL)
        assert theirs(exported.model, ids_of(exported, text_BL)) == wanted
        answers += wanted
    assert len(answers) == 50
    assert len({tuple(answer) for answer in answers}) > 25  # they differ
    assert len({token for answer in answers for token in answer}) > 50


def test_the_bias_counts(exported):
    """Without the `sequence_bias` of the folder, a v2 llm answers otherwise; v3 has none."""
    text_BL = prompts(8, 20)
    ids_BT = ids_of(exported, text_BL)
    without = theirs(exported.model, ids_BT, sequence_bias=[[[0], 0.0]])
    has_bias = exported.network.llm_decoder.bias is not None
    assert has_bias == (exported.config.family.name == "cosyvoice2")
    assert (without != ours(exported.network, text_BL)) == has_bias


@torch.inference_mode()
def test_nothing_but_speech_wins(exported):
    ids_BT = torch.randint(exported.model.config.vocab_size, (4, 60))
    logits_BTV = exported.model(ids_BT).logits
    classes = exported.network.llm_decoder.out_features
    speech, after = logits_BTV[..., TEXT : TEXT + classes], logits_BTV[..., TEXT + classes :]
    highest = speech.amax(-1)
    assert (logits_BTV[..., :TEXT].amax(-1) < highest).all()
    assert not after.numel() or (after.amax(-1) < highest).all()


def test_the_tokenizer_makes_the_prompt_of_a_text(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    family = exported.config.family
    own = build(family.tokenizer, "tokenizer")
    text, instruct = "Hey, {you} 'there' [breath].", family.instruct
    wanted = ids_of(exported, torch.tensor([own.encode(instruct) + own.encode(text)]))[0].tolist()
    assert tokenizer(f"<|sos|>{instruct}{text}<|task_id|>").input_ids == wanted
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, tokenize=False)
    assert tokenizer(chat).input_ids == wanted
    speech = tokenizer("<|s_0|><|s_42|><|s_6560|>").input_ids
    assert speech == [TEXT, TEXT + 42, TEXT + SPEECH - 1]
    assert len(tokenizer) == exported.model.config.vocab_size
    ends = exported.model.generation_config.eos_token_id
    assert set(ends) == {TEXT + i for i in range(SPEECH, exported.network.llm_decoder.out_features)}
    layout = exported.config.model.collator["layout"]
    assert tokenizer.eos_token_id == TEXT + SPEECH + layout["eos"]


def test_the_card_has_the_numbers_of_the_model(exported):
    card = (exported.folder / "README.md").read_text()
    names = AutoTokenizer.from_pretrained(exported.folder).convert_tokens_to_ids
    assert f"| {names('<|sos|>')}, {names('<|task_id|>')} |" in card and "$" not in card
    assert f"<|sos|>{exported.config.family.instruct}TEXT<|task_id|>" in card
    assert ("sequence_bias" in card) == (exported.config.family.name == "cosyvoice2")


def test_config_json_names_the_base_of_the_rotation_for_older_readers(exported):
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["rope_theta"] == exported.config.network.get("theta", 1e6)
    assert not config["tie_word_embeddings"]


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "a flow": (["model=flow"], {}, "is for the llm of cosyvoice2 and cosyvoice3"),
    "a v1 llm": ([*TINY["llm"], "model=llm"], {}, "is for the llm of cosyvoice2 and cosyvoice3"),
    "characters": (family_words("cosyvoice2", "llm"), {}, "this one has another tokenizer"),
    "no tokenizer": (
        [*family_words("cosyvoice2", "llm")[:-1]],
        {},
        "give its folder as format.tokenizer=",
    ),
    "a component": ([], {"names": ["llm.decode"]}, "leave components= out"),
    "int8": ([], {"precision": "int8"}, "not in int8: leave precision= out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    words, options, message = REFUSED[case]
    config = compose_train(words)
    save_tensors(tmp_path / "a.safetensors", build(config.network, "network").state_dict())
    source = source_from_file(config, str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=message):
        HuggingFace().export(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_transformers_reads_otherwise_is_refused(exported, tmp_path):
    vocabulary = vocabulary_of(exported.config, exported.network)
    bias_V = joined_weights(exported.network, vocabulary)[1]
    shutil.copytree(exported.folder, tmp_path / "hf")
    verify(exported.network, tmp_path / "hf", vocabulary, bias_V)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 100.0}))
    with pytest.raises(UserError, match="transformers gives other logits than PyTorch"):
        verify(exported.network, tmp_path / "hf", vocabulary, bias_V)
