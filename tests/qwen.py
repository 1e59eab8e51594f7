"""A tokenizer with the ids of Qwen2 that loads in a second: one piece per byte, no merges."""

import json
from pathlib import Path

PIECES = 151643
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_tokenizer(folder: Path) -> Path:
    """Writes vocab.json, merges.txt and tokenizer_config.json, as CosyVoice-BlankEN has them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    names = letters + [f"piece{i}" for i in range(len(letters), PIECES)]
    vocabulary = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        PIECES + i: {"content": name, **flags, "special": True} for i, name in enumerate(SPECIALS)
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
